/* Corrections: where the engine accepts what a processor refuses, or computes something else.
 *
 * The engine calls its own functions through pointers in its image: helpers from translated code (_slots.h), and its
 * translator through the procedure linkage table. `install` puts functions of ours in place of some, once a process
 * and before the first engine is opened; it changes nothing unless everything is where it is expected. Functions of ours
 * serve the engines that were attached, and hand all others on.
 *
 *   _corrections_system.c   MSRs, control registers, SYSEXIT
 *   _corrections_code.c     undefined encodings, CMPXCHG, alignment
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "_slots.h"

#include "_corrections.h"

#include <stdatomic.h>

#define MAX_OWNERS 64
/* CPUClass: reset, has_work, do_interrupt, do_unaligned_access. */
#define CLASS_DO_INTERRUPT 2
#define CLASS_DO_UNALIGNED 3

Places places;

typedef struct {
    _Atomic(uint8_t *) env;
    Owner owner;
} Row;

static Row rows[MAX_OWNERS];
static int used;
static bool installed;

const Owner *owner_of(const uint8_t *env)
{
    for (int n = 0; n < used; n++)
        if (atomic_load_explicit(&rows[n].env, memory_order_relaxed) == env)
            return &rows[n].owner;
    return NULL;
}

/* Where the linkage table holds the address of an exported function; 0 when that is not the function's. */
static uintptr_t linkage_place(const struct link_map *map, uintptr_t function)
{
    const Elf64_Rela *relocations = NULL;
    const Elf64_Sym *symbols = NULL;
    size_t count = 0;
    for (const Elf64_Dyn *item = map->l_ld; item->d_tag != DT_NULL; item++) {
        if (item->d_tag == DT_JMPREL)
            relocations = (const Elf64_Rela *)item->d_un.d_ptr;
        else if (item->d_tag == DT_PLTRELSZ)
            count = item->d_un.d_val / sizeof *relocations;
        else if (item->d_tag == DT_SYMTAB)
            symbols = (const Elf64_Sym *)item->d_un.d_ptr;
    }
    for (size_t n = 0; symbols != NULL && relocations != NULL && n < count; n++) {
        uintptr_t place = map->l_addr + relocations[n].r_offset;
        if (map->l_addr + symbols[ELF64_R_SYM(relocations[n].r_info)].st_value == function)
            return *(const uintptr_t *)place == function ? place : 0;
    }
    return 0;
}

static PyObject *corrections_install(PyObject *self, PyObject *arguments)
{
    (void)self;
    unsigned long long handle, translate, load_byte;
    Py_buffer given;
    if (!PyArg_ParseTuple(arguments, "Ky*KK", &handle, &given, &translate, &load_byte))
        return NULL;
    bool fits = given.len == (Py_ssize_t)sizeof places;
    if (fits && !installed)
        memcpy(&places, given.buf, sizeof places);
    PyBuffer_Release(&given);
    if (!fits) {
        PyErr_SetString(PyExc_ValueError, "places of another version");
        return NULL;
    }
    if (installed)
        Py_RETURN_TRUE;
    struct link_map *map;
    if (dlinfo((void *)(uintptr_t)handle, RTLD_DI_LINKMAP, &map))
        Py_RETURN_FALSE;
    uintptr_t translate_place = linkage_place(map, translate), load_place = linkage_place(map, load_byte);
    if (!translate_place || !load_place)
        Py_RETURN_FALSE;
    Slot slots[] = {
        {"helper_rdmsr", (SlotFunction)corrected_rdmsr, (SlotFunction *)&engine_rdmsr, NULL, 0},
        {"helper_wrmsr", (SlotFunction)corrected_wrmsr, (SlotFunction *)&engine_wrmsr, NULL, 0},
        {"helper_write_crN", (SlotFunction)corrected_write_cr, (SlotFunction *)&engine_write_cr, NULL, 0},
        {"helper_sysexit", (SlotFunction)corrected_sysexit, (SlotFunction *)&engine_sysexit, NULL, 0},
    };
    if (!slots_replace((void *)(uintptr_t)handle, slots, sizeof slots / sizeof *slots))
        Py_RETURN_FALSE;
    engine_translate = (void (*)(uint8_t *, uint8_t *, int))(uintptr_t)translate;
    engine_load_byte = (uint32_t(*)(uint8_t *, uint64_t))(uintptr_t)load_byte;
    /* Nobody is attached yet, so a part of all this alone would do no harm. */
    installed = slot_write(load_place, (SlotFunction)corrected_load_byte) &&
                slot_write(translate_place, (SlotFunction)corrected_translate);
    return PyBool_FromLong(installed);
}

static PyObject *corrections_attach(PyObject *self, PyObject *arguments)
{
    (void)self;
    unsigned long long cpu, cr4, efer, address_bits;
    int amd;
    if (!PyArg_ParseTuple(arguments, "KKKKp", &cpu, &cr4, &efer, &address_bits, &amd))
        return NULL;
    uint64_t *class = installed ? *(uint64_t **)(uintptr_t)(cpu + places.cpu_class) : NULL;
    if (class == NULL || class[CLASS_DO_INTERRUPT] != places.do_interrupt ||
        (class[CLASS_DO_UNALIGNED] && class[CLASS_DO_UNALIGNED] != (uint64_t)(uintptr_t)corrected_unaligned))
        Py_RETURN_FALSE;
    for (int n = 0; n < MAX_OWNERS; n++) {
        if (atomic_load(&rows[n].env))
            continue;
        uint8_t *env = *(uint8_t **)(uintptr_t)(cpu + places.env_ptr);
        class[CLASS_DO_UNALIGNED] = (uint64_t)(uintptr_t)corrected_unaligned;
        rows[n].owner = (Owner){env, cr4, efer, address_bits, amd};
        atomic_store(&rows[n].env, env);
        if (n >= used)
            used = n + 1;
        Py_RETURN_TRUE;
    }
    Py_RETURN_FALSE;
}

static PyObject *corrections_detach(PyObject *self, PyObject *argument)
{
    (void)self;
    unsigned long long env = PyLong_AsUnsignedLongLong(argument);
    if (PyErr_Occurred())
        return NULL;
    for (int n = 0; env && n < used; n++)
        if (atomic_load(&rows[n].env) == (uint8_t *)(uintptr_t)env)
            atomic_store(&rows[n].env, NULL);
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"install", corrections_install, METH_VARARGS,
     "install(handle, places, translate, load_byte): take the engine's places over; False when they are not as expected."},
    {"attach", corrections_attach, METH_VARARGS,
     "attach(cpu, cr4, efer, address_bits, amd): serve this engine; False when it is not as expected, or there are too many."},
    {"detach", corrections_detach, METH_O, "detach(env): no longer."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, .m_name = "_corrections", .m_size = -1, .m_methods = methods};

PyMODINIT_FUNC PyInit__corrections(void)
{
    return PyModule_Create(&module);
}
