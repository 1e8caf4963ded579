/* Fast stores: keeps the engine from taking the slow path for every store to a page that holds no translated code.
 *
 * Theory of operation
 * -------------------
 * The engine must notice stores to pages from which it translated code. It marks TLB entries "not dirty"; a store
 * through such an entry takes a helper function, which drops the overlapping translations. For pages that the guest
 * may execute, the engine never takes the mark away again, code or no code. While Linux boots, the whole kernel image,
 * data included, is executable, and a quarter of the boot's time goes into that helper. For other pages it takes the
 * mark away at the first store, and does not put it back when code is translated from the page through another
 * address: then later stores through the first address go unnoticed.
 *
 * Here the truth is one byte for each physical page, `code`: nonzero when translations of it may exist. Invariant:
 * while a page's byte is nonzero, every TLB entry that can write to it carries the mark.
 *
 *   - A block has been translated (the engine calls tlb_reset_dirty_by_vaddr): the byte of its pages becomes 1, and
 *     when it was 0, all entries for that physical page get the mark, whatever their virtual address.
 *   - A store through a marked entry (the engine's store helpers) to a page whose byte is 0: the mark goes, and the
 *     store is done here. Later ones are done by the translated code alone.
 *   - The same to a page whose byte is not 0: the engine's own helper does it, which knows how to deal with code that
 *     changes itself. After `PATIENCE` of them in a row the page is taken for data: all its translations are dropped.
 *   - The engine wants to take a mark away (tlb_set_dirty): only from pages whose byte is 0.
 *
 * The engine calls the three functions through pointers in its image: a table of helpers from which translated code is
 * made, and two slots of its global offset table. `install` checks that exactly the expected addresses stand there
 * before it puts others in their place; otherwise it changes nothing, and everything works as slowly as before.
 *
 * Engines are told apart by their CPU structure. An engine's entry is touched by its vCPU thread alone while it runs.
 */
#define _GNU_SOURCE
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <dlfcn.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define PAGE_BITS 12
#define PAGE_MASK (~(uint64_t)0xfff)
/* Flags in the low bits of a TLB entry's addresses. */
#define TLB_INVALID (1u << 11)
#define TLB_NOTDIRTY (1u << 10)
#define TLB_FLAGS 0xfffu
/* A store helper's `oi`: MMU mode in bits 0-3, above it the kind of access with its alignment demand. */
#define OI_MODE 15u
#define OI_ALIGNMENT (0x70u << 4)

#define MODES 3
#define VICTIMS 8
#define ENTRY_BITS 6
/* struct CPUTLBDesc: its size, and its victim table's place in it. */
#define DESC_SIZE 696
#define DESC_VICTIMS 48
/* From the last CPUTLBDesc's end to the first CPUTLBDescFast. */
#define DESC_GAP 8

#define MAX_ENGINES 64
#define PATIENCE 64

typedef struct {
    uint64_t read, write, code, paddr, addend, unused[3];
} Entry;

typedef struct {
    uint64_t mask; /* (entries - 1) << ENTRY_BITS */
    Entry *table;
} Mode;

typedef struct {
    _Atomic(uint8_t *) env;
    void *uc;
    Mode *modes;
    uint64_t ram; /* host address of guest RAM */
    uint64_t pages;
    uint8_t *code;
} Vcpu;

static Vcpu vcpus[MAX_ENGINES];
static int used;
static bool installed;

typedef void (*Store8)(uint8_t *, uint64_t, uint8_t, uint32_t, uintptr_t);
typedef void (*Store16)(uint8_t *, uint64_t, uint16_t, uint32_t, uintptr_t);
typedef void (*Store32)(uint8_t *, uint64_t, uint32_t, uint32_t, uintptr_t);
typedef void (*Store64)(uint8_t *, uint64_t, uint64_t, uint32_t, uintptr_t);
static Store8 engine_store8;
static Store16 engine_store16;
static Store32 engine_store32;
static Store64 engine_store64;
static void (*engine_reset_dirty)(uint8_t *, uint64_t, uint64_t);
static void (*engine_set_dirty)(uint8_t *, uint64_t);
static void (*engine_invalidate)(void *, uint64_t, uint64_t);
static uint64_t (*engine_ram_address)(void *, void *);
static uint64_t cpu_env_ptr; /* offset of CPUState.env_ptr */

static inline Vcpu *find(uint8_t *env)
{
    for (int n = 0; n < used; n++)
        if (atomic_load_explicit(&vcpus[n].env, memory_order_relaxed) == env)
            return &vcpus[n];
    return NULL;
}

static inline Entry *entry_of(const Mode *mode, uint64_t address)
{
    return (Entry *)((char *)mode->table + ((address >> (PAGE_BITS - ENTRY_BITS)) & mode->mask));
}

static inline Entry *victims_of(const Vcpu *v, int mode)
{
    return (Entry *)((char *)v->modes - DESC_GAP - (MODES - mode) * DESC_SIZE + DESC_VICTIMS);
}

/* Number of the physical page behind an entry for `page`; not below v->pages when it is not RAM. */
static inline uint64_t number_of(const Vcpu *v, const Entry *e, uint64_t page)
{
    return (page + e->addend - v->ram) >> PAGE_BITS;
}

static void drop_page(Vcpu *v, uint64_t number)
{
    uint64_t start = engine_ram_address(v->uc, (void *)(uintptr_t)(v->ram + (number << PAGE_BITS)));
    if (start == UINT64_MAX)
        return;
    engine_invalidate(v->uc, start, start + (1u << PAGE_BITS));
    v->code[number] = 0;
}

/* A store through a marked entry. True when it can be done in place. */
static inline bool in_place(Vcpu *v, Entry *e, uint64_t address, uint32_t oi, unsigned size)
{
    uint64_t page = address & PAGE_MASK;
    if (e->write != (page | TLB_NOTDIRTY) || (address & ~PAGE_MASK) > (1u << PAGE_BITS) - size || (oi & OI_ALIGNMENT))
        return false;
    uint64_t number = number_of(v, e, page);
    if (number >= v->pages || v->code[number])
        return false;
    e->write = page;
    return true;
}

static inline void count_store(Vcpu *v, uint64_t address, uint32_t oi)
{
    uint64_t page = address & PAGE_MASK;
    Entry *e = entry_of(&v->modes[oi & OI_MODE], address);
    if (e->write != (page | TLB_NOTDIRTY))
        return;
    uint64_t number = number_of(v, e, page);
    if (number < v->pages && v->code[number] && ++v->code[number] > PATIENCE)
        drop_page(v, number);
}

#define STORE(bits)                                                                                                    \
    static void store##bits(uint8_t *env, uint64_t address, uint##bits##_t value, uint32_t oi, uintptr_t back)         \
    {                                                                                                                  \
        Vcpu *v = find(env);                                                                                           \
        if (!v) {                                                                                                      \
            engine_store##bits(env, address, value, oi, back);                                                         \
            return;                                                                                                    \
        }                                                                                                              \
        Entry *e = entry_of(&v->modes[oi & OI_MODE], address);                                                         \
        if (in_place(v, e, address, oi, bits / 8)) {                                                                   \
            memcpy((void *)(uintptr_t)(address + e->addend), &value, bits / 8);                                        \
            return;                                                                                                    \
        }                                                                                                              \
        engine_store##bits(env, address, value, oi, back); /* may leave by longjmp */                                  \
        count_store(v, address, oi);                                                                                   \
    }
STORE(8)
STORE(16)
STORE(32)
STORE(64)

static inline void mark_if(const Vcpu *v, Entry *e, uint64_t number)
{
    if (!(e->write & TLB_FLAGS) && number_of(v, e, e->write) == number)
        e->write |= TLB_NOTDIRTY;
}

static void mark_all(Vcpu *v, uint64_t number)
{
    for (int mode = 0; mode < MODES; mode++) {
        const Mode *m = &v->modes[mode];
        uint64_t entries = (m->mask >> ENTRY_BITS) + 1;
        for (uint64_t n = 0; n < entries; n++)
            mark_if(v, &m->table[n], number);
        Entry *victims = victims_of(v, mode);
        for (int n = 0; n < VICTIMS; n++)
            mark_if(v, &victims[n], number);
    }
}

/* The physical page from which code at `page` was translated just now, or UINT64_MAX. */
static uint64_t code_page(const Vcpu *v, uint64_t page)
{
    for (int mode = 0; mode < MODES; mode++) {
        const Entry *e = entry_of(&v->modes[mode], page);
        if ((e->code & (PAGE_MASK | TLB_INVALID)) == page && number_of(v, e, page) < v->pages)
            return number_of(v, e, page);
    }
    for (int mode = 0; mode < MODES; mode++) {
        const Entry *victims = victims_of(v, mode);
        for (int n = 0; n < VICTIMS; n++)
            if ((victims[n].code & (PAGE_MASK | TLB_INVALID)) == page && number_of(v, &victims[n], page) < v->pages)
                return number_of(v, &victims[n], page);
    }
    return UINT64_MAX;
}

/* In place of tlb_reset_dirty_by_vaddr: a block at [start, start+length) has been translated. */
static void reset_dirty(uint8_t *cpu, uint64_t start, uint64_t length)
{
    Vcpu *v = find(*(uint8_t **)(cpu + cpu_env_ptr));
    if (!v) {
        engine_reset_dirty(cpu, start, length);
        return;
    }
    for (uint64_t page = start & PAGE_MASK; page < start + length; page += 1u << PAGE_BITS) {
        uint64_t number = code_page(v, page);
        if (number == UINT64_MAX) {
            /* Nobody knows where that code lies: treat every page as if it held code. */
            for (uint64_t n = 0; n < v->pages; n++)
                if (!v->code[n]) {
                    v->code[n] = 1;
                    mark_all(v, n);
                }
            return;
        }
        if (!v->code[number])
            mark_all(v, number);
        v->code[number] = 1;
    }
}

/* In place of tlb_set_dirty: the engine wants to take the mark from the entries of a virtual page. */
static void set_dirty(uint8_t *cpu, uint64_t address)
{
    Vcpu *v = find(*(uint8_t **)(cpu + cpu_env_ptr));
    if (!v) {
        engine_set_dirty(cpu, address);
        return;
    }
    uint64_t page = address & PAGE_MASK;
    for (int mode = 0; mode < MODES; mode++) {
        Entry *e = entry_of(&v->modes[mode], page);
        uint64_t number = number_of(v, e, page);
        if (e->write == (page | TLB_NOTDIRTY) && !(number < v->pages && v->code[number]))
            e->write = page;
    }
}

/* ---- installing ------------------------------------------------------------------------------------------------ */

static bool replace(uint64_t place, const void *const *values, size_t count)
{
    uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE);
    uint64_t first = place & ~(page - 1);
    size_t size = (size_t)(place + count * sizeof(void *) - first);
    if (mprotect((void *)(uintptr_t)first, size, PROT_READ | PROT_WRITE))
        return false;
    memcpy((void *)(uintptr_t)place, values, count * sizeof(void *));
    return true; /* the pages stay writable: one of them holds the offset table, which must be */
}

static PyObject *stores_install(PyObject *self, PyObject *arguments)
{
    unsigned long long table, reset_slot, dirty_slot, s8, s16, s32, s64, reset, dirty, invalidate, ram_address, env_ptr;
    (void)self;
    if (!PyArg_ParseTuple(arguments, "KKKKKKKKKKKK", &table, &reset_slot, &dirty_slot, &s8, &s16, &s32, &s64, &reset,
                          &dirty, &invalidate, &ram_address, &env_ptr))
        return NULL;
    if (installed)
        Py_RETURN_TRUE;
    Dl_info info;
    if (!dladdr((void *)(uintptr_t)s8, &info))
        Py_RETURN_FALSE;
    uint64_t base = (uint64_t)(uintptr_t)info.dli_fbase;
    const uint64_t expected[4] = {s8, s16, s32, s64};
    if (memcmp((void *)(uintptr_t)(base + table), expected, sizeof expected))
        Py_RETURN_FALSE;
    /* The loader has filled the slots already, or they lead to the code that will. */
    const uint64_t slots[2] = {*(uint64_t *)(uintptr_t)(base + reset_slot), *(uint64_t *)(uintptr_t)(base + dirty_slot)};
    const uint64_t targets[2] = {reset, dirty};
    for (int n = 0; n < 2; n++) {
        Dl_info slot;
        if (slots[n] != targets[n] && (!dladdr((void *)(uintptr_t)slots[n], &slot) || slot.dli_fbase != info.dli_fbase))
            Py_RETURN_FALSE;
    }
    engine_store8 = (Store8)(uintptr_t)s8;
    engine_store16 = (Store16)(uintptr_t)s16;
    engine_store32 = (Store32)(uintptr_t)s32;
    engine_store64 = (Store64)(uintptr_t)s64;
    engine_reset_dirty = (void (*)(uint8_t *, uint64_t, uint64_t))(uintptr_t)reset;
    engine_set_dirty = (void (*)(uint8_t *, uint64_t))(uintptr_t)dirty;
    engine_invalidate = (void (*)(void *, uint64_t, uint64_t))(uintptr_t)invalidate;
    engine_ram_address = (uint64_t(*)(void *, void *))(uintptr_t)ram_address;
    cpu_env_ptr = env_ptr;
    const void *helpers[4] = {store8, store16, store32, store64};
    const void *resetter = reset_dirty, *setter = set_dirty;
    if (!replace(base + reset_slot, &resetter, 1) || !replace(base + dirty_slot, &setter, 1) ||
        !replace(base + table, helpers, 4))
        Py_RETURN_FALSE; /* a part of it alone is harmless: engines that are not attached are left to themselves */
    installed = true;
    Py_RETURN_TRUE;
}

/* Whether this looks like the TLBs of a new engine. */
static bool plausible(const Mode *modes)
{
    for (int mode = 0; mode < MODES; mode++) {
        uint64_t entries = (modes[mode].mask >> ENTRY_BITS) + 1;
        const char *desc = (const char *)modes - DESC_GAP - (MODES - mode) * DESC_SIZE;
        uint64_t victim = *(const uint64_t *)(desc + DESC_VICTIMS - 8), iotlb = *(const uint64_t *)(desc + DESC_SIZE - 8);
        if (modes[mode].mask & ((1u << ENTRY_BITS) - 1) || entries & (entries - 1) || entries < 2 || entries > 1u << 22)
            return false;
        if (!modes[mode].table || !iotlb || victim >= VICTIMS)
            return false;
        for (int n = 0; n < VICTIMS; n++)
            if (((const Entry *)(desc + DESC_VICTIMS))[n].write != UINT64_MAX)
                return false;
    }
    return true;
}

static PyObject *stores_attach(PyObject *self, PyObject *arguments)
{
    unsigned long long uc, env, modes, ram, size;
    (void)self;
    if (!PyArg_ParseTuple(arguments, "KKKKK", &uc, &env, &modes, &ram, &size))
        return NULL;
    if (!installed || !plausible((const Mode *)(uintptr_t)modes))
        Py_RETURN_FALSE;
    for (int n = 0; n < MAX_ENGINES; n++) {
        Vcpu *v = &vcpus[n];
        if (atomic_load(&v->env))
            continue;
        uint64_t pages = size >> PAGE_BITS;
        uint8_t *code = mmap(NULL, pages, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (code == MAP_FAILED)
            return PyErr_NoMemory();
        v->uc = (void *)(uintptr_t)uc;
        v->modes = (Mode *)(uintptr_t)modes;
        v->ram = ram;
        v->pages = pages;
        v->code = code;
        atomic_store(&v->env, (uint8_t *)(uintptr_t)env);
        if (n >= used)
            used = n + 1;
        Py_RETURN_TRUE;
    }
    Py_RETURN_FALSE;
}

static PyObject *stores_detach(PyObject *self, PyObject *argument)
{
    (void)self;
    unsigned long long env = PyLong_AsUnsignedLongLong(argument);
    if (PyErr_Occurred())
        return NULL;
    Vcpu *v = find((uint8_t *)(uintptr_t)env);
    if (v && env) {
        atomic_store(&v->env, NULL);
        munmap(v->code, v->pages);
    }
    Py_RETURN_NONE;
}

/* Drop what was translated from [offset, offset+size) of RAM. Nearly always one look at a few bytes. */
static void drop_pages(Vcpu *v, uint64_t offset, uint64_t size)
{
    if (!size || offset >= v->pages << PAGE_BITS)
        return;
    uint64_t last = size > (v->pages << PAGE_BITS) - offset ? v->pages - 1 : (offset + size - 1) >> PAGE_BITS;
    for (uint64_t n = offset >> PAGE_BITS; n <= last; n++)
        if (v->code[n])
            drop_page(v, n);
}

/* A device wrote one piece. */
static PyObject *stores_written(PyObject *self, PyObject *const *arguments, Py_ssize_t count)
{
    (void)self;
    if (count != 3)
        return PyErr_Format(PyExc_TypeError, "written() takes 3 arguments");
    unsigned long long env = PyLong_AsUnsignedLongLong(arguments[0]);
    unsigned long long offset = PyLong_AsUnsignedLongLong(arguments[1]);
    unsigned long long size = PyLong_AsUnsignedLongLong(arguments[2]);
    if (PyErr_Occurred())
        return NULL;
    Vcpu *v = find((uint8_t *)(uintptr_t)env);
    if (v && env)
        drop_pages(v, offset, size);
    Py_RETURN_NONE;
}

/* The same for many pieces: rows of (offset, size), 64 bits each. False, with nothing done, when one ends above `limit`. */
static PyObject *stores_written_all(PyObject *self, PyObject *arguments)
{
    (void)self;
    unsigned long long env, limit;
    Py_buffer rows;
    if (!PyArg_ParseTuple(arguments, "Ky*K", &env, &rows, &limit))
        return NULL;
    Vcpu *v = find((uint8_t *)(uintptr_t)env);
    const uint64_t(*row)[2] = rows.buf;
    Py_ssize_t count = rows.len / 16;
    bool below = true;
    for (Py_ssize_t n = 0; n < count; n++)
        below &= row[n][0] <= limit && row[n][1] <= limit - row[n][0];
    for (Py_ssize_t n = 0; below && v && env && n < count; n++)
        drop_pages(v, row[n][0], row[n][1]);
    PyBuffer_Release(&rows);
    return PyBool_FromLong(below);
}

static PyObject *stores_code_pages(PyObject *self, PyObject *argument)
{
    (void)self;
    unsigned long long env = PyLong_AsUnsignedLongLong(argument);
    if (PyErr_Occurred())
        return NULL;
    Vcpu *v = find((uint8_t *)(uintptr_t)env);
    unsigned long count = 0;
    for (uint64_t n = 0; v && env && n < v->pages; n++)
        count += v->code[n] != 0;
    return PyLong_FromUnsignedLong(count);
}

static PyMethodDef methods[] = {
    {"install", stores_install, METH_VARARGS, "Take the engine's places over; False when they are not as expected."},
    {"attach", stores_attach, METH_VARARGS, "attach(uc, env, modes, ram, size): serve this engine; False if full."},
    {"detach", stores_detach, METH_O, "detach(env): no longer."},
    {"written", (PyCFunction)(void (*)(void))stores_written, METH_FASTCALL,
     "written(env, offset, size): RAM was written by a device; drop what was translated from there."},
    {"written_all", stores_written_all, METH_VARARGS,
     "written_all(env, rows, limit): the same of rows of (offset, size), in a contiguous buffer of 64-bit numbers; False,\n"
     "with nothing done, when one of them ends above `limit`."},
    {"code_pages", stores_code_pages, METH_O, "code_pages(env): pages with translated code."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, .m_name = "_stores", .m_size = -1, .m_methods = methods};

PyMODINIT_FUNC PyInit__stores(void)
{
    return PyModule_Create(&module);
}
