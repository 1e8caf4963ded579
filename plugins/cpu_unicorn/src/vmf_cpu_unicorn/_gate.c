/* The native gate: what must happen between the engine and vmf without Python frames in between.
 *
 * Theory of operation
 * -------------------
 * Unicorn stops short of three things that a whole machine needs; the gate adds them, driving the engine's own
 * exported functions (their addresses, and the offsets of the fields used, come calibrated from layout.py):
 *
 *  - Exceptions. Unicorn reports them to a hook instead of delivering them. The hook here calls the engine's own
 *    delivery, which may fault again (stack not present, bad gate) and then leaves by longjmp to the engine's loop,
 *    over our frame. That is why it is C: a longjmp over a Python frame is a crash.
 *  - SYSCALL, which the engine leaves undefined.
 *  - Port access rights (CPL against IOPL and the TSS bitmap), which the engine does not check.
 *
 * Interrupts use the engine's virtual-interrupt request: its bit is set while the controller asserts INTR, and the
 * engine looks at it whenever IF may have opened. At the moment of delivery it fetches the vector from guest-physical
 * memory at vm_vmcb+0x64. That page is MMIO of ours, so its read callback *is* the INTA cycle: an interrupt is
 * acknowledged only when it is really being delivered, and nothing is ever in flight between two slices.
 * The same callback, reached with IF forced open, injects an exception that a restored state brought along.
 *
 * Stopping. uc_emu_stop() from another thread is forgotten when it comes before uc_emu_start() has begun. The pacer,
 * one native thread a gate, repeats it until the slice has ended, on a deadline or a kick, and never needs the GIL.
 * (Python sets the engine's no_exit_request, so that stops are noticed at block starts only.)
 *
 * GIL: released around the engine, taken back for each callback into Python. The mutex of the pacer is only ever held
 * for a few instructions, never while taking the GIL.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

/* RFLAGS, SDM vol. 1 3.4.3. */
#define FLAGS_ARITHMETIC 0x8d5u
#define FLAG_IF (1u << 9)
#define FLAG_DF (1u << 10)
#define FLAG_RF (1u << 16)
#define FLAG_VM (1u << 17)
/* The engine's "hidden flags". */
#define HF2_NMI_MASKED (1u << 2)
#define HF_CPL 3u
#define HF_INHIBIT_IRQ (1u << 3)
#define HF_LMA (1u << 14)
#define HF_CS64 (1u << 15)
#define HF_COPIES (1u << 8 | 3u << 12 | 1u << 17) /* TF, IOPL, VM: see layout.py */
/* Second doubleword of a segment descriptor, SDM vol. 3A 3.4.5. */
#define DESC_A (1u << 8)
#define DESC_RW (1u << 9)
#define DESC_CODE (1u << 11)
#define DESC_S (1u << 12)
#define DESC_P (1u << 15)
#define DESC_L (1u << 21)
#define DESC_B (1u << 22)
#define DESC_G (1u << 23)
/* The engine's CPUState.interrupt_request. */
#define REQUEST_VIRQ 0x100u
#define REQUEST_NMI 0x200u
#define CC_OP_EFLAGS 1u
#define VECTOR_UD 6
#define VECTOR_DF 8
#define VECTOR_GP 13

enum { EXIT_KICKED, EXIT_HALTED, EXIT_SHUTDOWN, EXIT_ERROR };

/* Filled by gate_native.py in this very order; every member is 8 bytes wide. */
typedef struct {
    uint64_t uc, cpu, env;
    uint64_t fn_emu_start, fn_emu_stop, fn_do_interrupt, fn_update_hflags, fn_cc_compute_all, fn_ldub_code;
    uint64_t fn_check_iob, fn_check_iow, fn_check_iol, fn_raise_exception_err, fn_cpu_loop_exit;
    uint64_t interrupt_request, icount_decr, halted; /* addresses */
    uint64_t eip, eflags, cc_src, cc_op, df, hflags, hflags2, segs, cr, efer, star, lstar, cstar, fmask; /* offsets in env */
    uint64_t exception_is_int, exception_next_eip, old_exception, vm_vmcb, vector_page;
} Config;

typedef struct {
    uint32_t leaf, subleaf, eax, ebx, ecx, edx;
} CpuidRow;

typedef struct Gate Gate;

typedef struct MmioWindow {
    Gate *gate;
    uint64_t base;
    struct MmioWindow *next;
} MmioWindow;

struct Gate {
    PyObject_HEAD
    Config c;
    uint8_t *env;
    PyObject *port_read, *port_write, *mmio_read, *mmio_write, *pending, *acknowledge;
    PyObject *error;          /* the first exception a callback raised */
    PyThreadState *thread;    /* saved while the engine runs */
    CpuidRow *cpuid;
    Py_ssize_t cpuid_rows;
    MmioWindow *windows;
    bool cpuid_osxsave;       /* the contract has XSAVE, so bit 27 follows CR4.OSXSAVE */
    bool halted, nmi_pending;
    int inflight;             /* acknowledged vector of a restored state, or -1 */
    int exception;            /* exception of a restored state, or -1 */
    uint32_t exception_code, saved_if, saved_inhibit;
    uint32_t request_after;   /* what to request once the exception has been injected */
    int engine_error;
    /* Shared with the pacer, under `lock`. */
    pthread_t pacer;
    pthread_mutex_t lock;
    pthread_cond_t wake;
    bool pacer_runs, quit, in_slice;
    int64_t deadline, asleep_until; /* CLOCK_MONOTONIC, ns */
    atomic_bool kicked;
};

#define ENV32(g, field) (*(uint32_t *)((g)->env + (g)->c.field))
#define ENV64(g, field) (*(uint64_t *)((g)->env + (g)->c.field))
#define REG(g, n) (((uint64_t *)(g)->env)[n])
#define REQUEST(g) (*(volatile uint32_t *)(uintptr_t)(g)->c.interrupt_request)

enum { RAX, RCX, RDX, RBX, R11 = 11 };
enum { SEG_CS = 1, SEG_SS = 2 };

static int64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

/* ---- calls into the engine ------------------------------------------------------------------------------------ */

static void engine_stop(Gate *g)
{
    ((int (*)(void *))(uintptr_t)g->c.fn_emu_stop)((void *)(uintptr_t)g->c.uc);
}

/* Make the engine look at interrupt_request at the next block start. vCPU thread only. */
static void engine_poke(Gate *g)
{
    ((volatile uint16_t *)(uintptr_t)g->c.icount_decr)[1] = 0xffff;
}

static void engine_update_hflags(Gate *g)
{
    ((void (*)(void *))(uintptr_t)g->c.fn_update_hflags)(g->env);
    ENV32(g, hflags) &= ~HF_COPIES;
}

/* Does not return: longjmp to the engine's loop, which delivers it. */
static void engine_raise(Gate *g, int vector, uint32_t code)
{
    ((void (*)(void *, int, int))(uintptr_t)g->c.fn_raise_exception_err)(g->env, vector, (int)code);
}

static uint32_t engine_flags(Gate *g)
{
    uint32_t arithmetic =
        ((uint32_t (*)(void *, int))(uintptr_t)g->c.fn_cc_compute_all)(g->env, (int)ENV32(g, cc_op));
    return (uint32_t)ENV64(g, eflags) | arithmetic | (ENV32(g, df) & FLAG_DF);
}

static void load_segment(Gate *g, int which, uint32_t selector, uint32_t flags)
{
    /* selector, base, limit, flags: 24 bytes */
    uint8_t *segment = g->env + g->c.segs + 24 * which;
    *(uint32_t *)segment = selector;
    *(uint64_t *)(segment + 8) = 0;
    *(uint32_t *)(segment + 16) = 0xffffffffu;
    *(uint32_t *)(segment + 20) = flags;
}

/* ---- Python side ---------------------------------------------------------------------------------------------- */

static void python_enter(Gate *g)
{
    PyEval_RestoreThread(g->thread);
}

static void python_leave(Gate *g)
{
    g->thread = PyEval_SaveThread();
}

/* A callback raised: keep the first exception and end the slice at the next block start. GIL held. */
static void keep_error(Gate *g)
{
    PyObject *type, *value, *traceback;
    PyErr_Fetch(&type, &value, &traceback);
    PyErr_NormalizeException(&type, &value, &traceback);
    if (value != NULL && traceback != NULL)
        PyException_SetTraceback(value, traceback);
    Py_XDECREF(type);
    Py_XDECREF(traceback);
    if (g->error == NULL)
        g->error = value;
    else
        Py_XDECREF(value);
    engine_stop(g);
}

/* -1 on error (kept). GIL held. */
static int ask_pending(Gate *g)
{
    PyObject *answer = PyObject_CallNoArgs(g->pending);
    if (answer == NULL) {
        keep_error(g);
        return -1;
    }
    int truth = answer == Py_True ? 1 : answer == Py_False ? 0 : PyObject_IsTrue(answer);
    Py_DECREF(answer);
    if (truth < 0)
        keep_error(g);
    return truth;
}

/* Mirror INTR into the engine. GIL held, vCPU thread. */
static void refresh_request(Gate *g)
{
    int asserted = ask_pending(g);
    if (asserted > 0 || g->inflight >= 0) {
        if (!(REQUEST(g) & REQUEST_VIRQ)) {
            REQUEST(g) |= REQUEST_VIRQ;
            engine_poke(g);
        }
    } else {
        REQUEST(g) &= ~REQUEST_VIRQ;
    }
}

static uint64_t call_read(Gate *g, PyObject *handler, uint64_t address, unsigned size)
{
    uint64_t value = ~(uint64_t)0;
    python_enter(g);
    PyObject *arguments[2] = {PyLong_FromUnsignedLongLong(address), PyLong_FromUnsignedLong(size)};
    PyObject *answer = NULL;
    if (arguments[0] != NULL && arguments[1] != NULL)
        answer = PyObject_Vectorcall(handler, arguments, 2, NULL);
    Py_XDECREF(arguments[0]);
    Py_XDECREF(arguments[1]);
    if (answer != NULL) {
        value = PyLong_AsUnsignedLongLongMask(answer);
        Py_DECREF(answer);
    }
    if (answer == NULL || (value == ~(uint64_t)0 && PyErr_Occurred()))
        keep_error(g);
    refresh_request(g);
    python_leave(g);
    return value;
}

static void call_write(Gate *g, PyObject *handler, uint64_t address, unsigned size, uint64_t value)
{
    python_enter(g);
    PyObject *arguments[3] = {
        PyLong_FromUnsignedLongLong(address), PyLong_FromUnsignedLong(size), PyLong_FromUnsignedLongLong(value)};
    PyObject *answer = NULL;
    if (arguments[0] != NULL && arguments[1] != NULL && arguments[2] != NULL)
        answer = PyObject_Vectorcall(handler, arguments, 3, NULL);
    Py_XDECREF(arguments[0]);
    Py_XDECREF(arguments[1]);
    Py_XDECREF(arguments[2]);
    if (answer == NULL)
        keep_error(g);
    Py_XDECREF(answer);
    refresh_request(g);
    python_leave(g);
}

/* ---- the engine's hooks --------------------------------------------------------------------------------------- */

static void on_exception(void *uc, uint32_t vector, void *user)
{
    Gate *g = user;
    (void)uc;
    if (ENV32(g, exception_is_int)) {
        /* The engine has moved RIP past INT n already. Delivery takes the return address from exception_next_eip; a
         * fault during delivery (gate privilege, gate absent) must report the INT itself. 1 byte: INT3, INTO. */
        ENV64(g, eip) = ENV64(g, exception_next_eip) - (vector == 3 || vector == 4 ? 1 : 2);
    }
    ((void (*)(void *))(uintptr_t)g->c.fn_do_interrupt)((void *)(uintptr_t)g->c.cpu);
}

static bool on_invalid_instruction(void *uc, void *user)
{
    on_exception(uc, VECTOR_UD, user);
    return true;
}

static void on_syscall(void *uc, void *user)
{
    /* AMD APM vol. 3, SYSCALL. RIP is at the instruction; the engine adds the instruction's length afterwards. */
    Gate *g = user;
    (void)uc;
    if (!(ENV64(g, efer) & 1))
        engine_raise(g, VECTOR_UD, 0);
    uint32_t hflags = ENV32(g, hflags);
    uint64_t base = hflags & HF_CS64 ? 0 : *(uint64_t *)(g->env + g->c.segs + 24 * SEG_CS + 8);
    uint64_t length = 2;
    for (unsigned i = 0; i < 14; i++) { /* prefixes may stand before 0F 05 */
        uint32_t byte = ((uint32_t (*)(void *, uint64_t))(uintptr_t)g->c.fn_ldub_code)(
            g->env, base + ENV64(g, eip) + i);
        if ((byte & 0xff) == 0x0f) {
            length = i + 2;
            break;
        }
    }
    uint32_t selector = (uint32_t)(ENV64(g, star) >> 32) & 0xfffc;
    uint32_t flags = engine_flags(g);
    uint64_t target;
    if (hflags & HF_LMA) {
        REG(g, RCX) = ENV64(g, eip) + length;
        REG(g, R11) = flags & ~FLAG_RF;
        flags &= ~((uint32_t)ENV64(g, fmask) | FLAG_RF);
        load_segment(g, SEG_CS, selector, DESC_G | DESC_P | DESC_S | DESC_CODE | DESC_RW | DESC_A | DESC_L);
        target = hflags & HF_CS64 ? ENV64(g, lstar) : ENV64(g, cstar);
    } else {
        REG(g, RCX) = (uint32_t)(ENV64(g, eip) + length);
        flags &= ~(FLAG_IF | FLAG_RF | FLAG_VM);
        load_segment(g, SEG_CS, selector, DESC_G | DESC_B | DESC_P | DESC_S | DESC_CODE | DESC_RW | DESC_A);
        target = (uint32_t)ENV64(g, star);
    }
    load_segment(g, SEG_SS, selector + 8, DESC_G | DESC_B | DESC_P | DESC_S | DESC_RW | DESC_A);
    ENV64(g, eflags) = (flags & ~(FLAGS_ARITHMETIC | FLAG_DF)) | 2;
    ENV64(g, cc_src) = flags & FLAGS_ARITHMETIC;
    ENV32(g, cc_op) = CC_OP_EFLAGS;
    ENV32(g, df) = flags & FLAG_DF ? (uint32_t)-1 : 1;
    engine_update_hflags(g);
    ENV64(g, eip) = target - length;
}

/* #GP unless this access is allowed. May longjmp: nothing of ours may be held. */
static void check_port(Gate *g, uint32_t port, int size)
{
    uint64_t flags = ENV64(g, eflags);
    if ((ENV64(g, cr) & 1) && ((ENV32(g, hflags) & HF_CPL) > ((flags >> 12) & 3) || (flags & FLAG_VM))) {
        uint64_t check = size == 1 ? g->c.fn_check_iob : size == 2 ? g->c.fn_check_iow : g->c.fn_check_iol;
        ((void (*)(void *, uint32_t))(uintptr_t)check)(g->env, port);
    }
}

static uint32_t on_in(void *uc, uint32_t port, int size, void *user)
{
    Gate *g = user;
    (void)uc;
    check_port(g, port, size);
    return (uint32_t)call_read(g, g->port_read, port & 0xffff, (unsigned)size);
}

static void on_out(void *uc, uint32_t port, int size, uint32_t value, void *user)
{
    Gate *g = user;
    (void)uc;
    check_port(g, port, size);
    call_write(g, g->port_write, port & 0xffff, (unsigned)size, value);
}

static int on_cpuid(void *uc, void *user)
{
    Gate *g = user;
    (void)uc;
    uint32_t leaf = (uint32_t)REG(g, RAX), subleaf = (uint32_t)REG(g, RCX);
    uint64_t answer[4] = {0, 0, 0, 0};
    /* Row 0xffffffff as subleaf: this leaf has no subleaves. A few dozen rows: linear is quick enough. */
    for (Py_ssize_t i = 0; i < g->cpuid_rows; i++) {
        const CpuidRow *row = &g->cpuid[i];
        if (row->leaf == leaf && (row->subleaf == subleaf || row->subleaf == 0xffffffffu)) {
            answer[0] = row->eax, answer[1] = row->ebx, answer[2] = row->ecx, answer[3] = row->edx;
            break;
        }
    }
    if (leaf == 1 && g->cpuid_osxsave && (((uint64_t *)(g->env + g->c.cr))[4] & (1u << 18)))
        answer[2] |= 1u << 27;
    REG(g, RAX) = answer[0], REG(g, RBX) = answer[1], REG(g, RCX) = answer[2], REG(g, RDX) = answer[3];
    return 1;
}

static uint64_t on_mmio_read(void *uc, uint64_t offset, unsigned size, void *user)
{
    MmioWindow *window = user;
    (void)uc;
    return call_read(window->gate, window->gate->mmio_read, window->base + offset, size);
}

static void on_mmio_write(void *uc, uint64_t offset, unsigned size, uint64_t value, void *user)
{
    MmioWindow *window = user;
    (void)uc;
    call_write(window->gate, window->gate->mmio_write, window->base + offset, size, value);
}

/* The INTA cycle (see the top of the file). */
static uint64_t on_vector_read(void *uc, uint64_t offset, unsigned size, void *user)
{
    Gate *g = user;
    (void)uc, (void)offset, (void)size;
    if (g->exception >= 0) {
        int vector = g->exception;
        g->exception = -1;
        ENV64(g, eflags) = (ENV64(g, eflags) & ~(uint64_t)FLAG_IF) | g->saved_if;
        ENV32(g, hflags) |= g->saved_inhibit;
        REQUEST(g) = g->request_after;
        engine_raise(g, vector, g->exception_code);
    }
    if (g->inflight >= 0) {
        int vector = g->inflight;
        g->inflight = -1;
        engine_stop(g); /* poll the controller before going on */
        return (uint64_t)vector;
    }
    long vector = -1;
    python_enter(g);
    PyObject *answer = PyObject_CallNoArgs(g->acknowledge);
    if (answer != NULL) {
        vector = PyLong_AsLong(answer);
        Py_DECREF(answer);
        if (!PyErr_Occurred() && (vector < 0 || vector > 255)) {
            PyErr_Format(PyExc_ValueError, "the interrupt controller gave vector %ld", vector);
            vector = -1;
        }
    }
    if (PyErr_Occurred()) {
        keep_error(g);
    } else if (ask_pending(g) > 0) {
        engine_stop(g); /* the engine clears its request after this delivery: come back to set it again */
    }
    python_leave(g);
    if (vector < 0) {
        REQUEST(g) &= ~REQUEST_VIRQ;
        ((void (*)(void *))(uintptr_t)g->c.fn_cpu_loop_exit)((void *)(uintptr_t)g->c.cpu);
    }
    return (uint64_t)vector;
}

static void on_vector_write(void *uc, uint64_t offset, unsigned size, uint64_t value, void *user)
{
    (void)uc, (void)offset, (void)size, (void)value, (void)user;
}

/* ---- the pacer ------------------------------------------------------------------------------------------------ */

#define RETRY_NS 200000

static void wait_until(Gate *g, int64_t when)
{
    g->asleep_until = when;
    if (when == INT64_MAX) {
        pthread_cond_wait(&g->wake, &g->lock);
    } else {
        struct timespec t = {when / 1000000000, when % 1000000000};
        pthread_cond_timedwait(&g->wake, &g->lock, &t);
    }
}

static void *pacer_main(void *argument)
{
    Gate *g = argument;
    pthread_mutex_lock(&g->lock);
    while (!g->quit) {
        if (!g->in_slice) {
            wait_until(g, INT64_MAX);
            continue;
        }
        int64_t now = now_ns();
        if (atomic_load(&g->kicked) || now >= g->deadline) {
            engine_stop(g);
            wait_until(g, now + RETRY_NS);
        } else {
            wait_until(g, g->deadline);
        }
    }
    pthread_mutex_unlock(&g->lock);
    return NULL;
}

static bool start_pacer(Gate *g)
{
    pthread_condattr_t attributes;
    pthread_mutex_init(&g->lock, NULL);
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_cond_init(&g->wake, &attributes);
    pthread_condattr_destroy(&attributes);
    g->asleep_until = INT64_MAX;
    g->pacer_runs = pthread_create(&g->pacer, NULL, pacer_main, g) == 0;
    return g->pacer_runs;
}

static void stop_pacer(Gate *g)
{
    if (!g->pacer_runs)
        return;
    g->pacer_runs = false;
    pthread_mutex_lock(&g->lock);
    g->quit = true;
    pthread_cond_signal(&g->wake);
    pthread_mutex_unlock(&g->lock);
    Py_BEGIN_ALLOW_THREADS
    pthread_join(g->pacer, NULL);
    Py_END_ALLOW_THREADS
}

/* ---- the object ----------------------------------------------------------------------------------------------- */

static PyObject *gate_run(PyObject *self, PyObject *argument)
{
    Gate *g = (Gate *)self;
    int64_t deadline = INT64_MAX;
    if (argument != Py_None) {
        deadline = PyLong_AsLongLong(argument);
        if (deadline == -1 && PyErr_Occurred())
            return NULL;
    }
    if (!g->pacer_runs) {
        PyErr_SetString(PyExc_RuntimeError, "the vCPU is closed");
        return NULL;
    }
    volatile uint32_t *halted = (uint32_t *)(uintptr_t)g->c.halted;
    g->engine_error = 0;
    for (;;) {
        if (atomic_exchange(&g->kicked, false))
            return PyLong_FromLong(EXIT_KICKED);
        int asserted = ask_pending(g);
        if (asserted < 0)
            return PyLong_FromLong(EXIT_ERROR);
        bool deliver = asserted || g->inflight >= 0;
        if (g->halted) {
            bool nmi = g->nmi_pending && !(ENV32(g, hflags2) & HF2_NMI_MASKED);
            bool wakes = nmi || g->exception >= 0 || (deliver && (ENV64(g, eflags) & FLAG_IF));
            if (!wakes)
                return PyLong_FromLong(EXIT_HALTED);
            g->halted = false;
        }
        uint32_t request = REQUEST(g) & ~REQUEST_VIRQ;
        if (g->nmi_pending)
            request |= REQUEST_NMI;
        g->nmi_pending = false;
        if (deliver)
            request |= REQUEST_VIRQ;
        if (g->exception >= 0) { /* see on_vector_read */
            g->saved_if = (uint32_t)ENV64(g, eflags) & FLAG_IF;
            g->saved_inhibit = ENV32(g, hflags) & HF_INHIBIT_IRQ;
            ENV64(g, eflags) |= FLAG_IF;
            ENV32(g, hflags) &= ~HF_INHIBIT_IRQ;
            g->request_after = request; /* the exception comes first */
            request = REQUEST_VIRQ;
        }
        REQUEST(g) = request;
        ENV64(g, vm_vmcb) = g->c.vector_page;
        *halted = 0;

        pthread_mutex_lock(&g->lock);
        g->in_slice = true;
        g->deadline = deadline;
        if (deadline < g->asleep_until || atomic_load(&g->kicked))
            pthread_cond_signal(&g->wake);
        pthread_mutex_unlock(&g->lock);

        python_leave(g);
        int code = ((int (*)(void *, uint64_t, uint64_t, uint64_t, size_t))(uintptr_t)g->c.fn_emu_start)(
            (void *)(uintptr_t)g->c.uc, ENV64(g, eip), 0, 0, 0);
        pthread_mutex_lock(&g->lock);
        g->in_slice = false;
        pthread_mutex_unlock(&g->lock);
        python_enter(g);

        if (REQUEST(g) & REQUEST_NMI) {
            REQUEST(g) &= ~REQUEST_NMI;
            g->nmi_pending = true;
        }
        if (g->error != NULL)
            return PyLong_FromLong(EXIT_ERROR);
        if (code != 0) {
            g->engine_error = code;
            return PyLong_FromLong(EXIT_ERROR);
        }
        if (PyErr_CheckSignals() < 0)
            return NULL;
        if (*halted) {
            g->halted = true;
        } else if ((int32_t)ENV32(g, old_exception) == VECTOR_DF) {
            return PyLong_FromLong(EXIT_SHUTDOWN); /* a double fault that could not be delivered */
        }
        if (!g->halted && now_ns() >= deadline) {
            atomic_store(&g->kicked, false);
            return PyLong_FromLong(EXIT_KICKED);
        }
    }
}

static PyObject *gate_kick(PyObject *self, PyObject *unused)
{
    Gate *g = (Gate *)self;
    (void)unused;
    atomic_store(&g->kicked, true);
    if (g->pacer_runs) {
        pthread_mutex_lock(&g->lock);
        if (g->in_slice) {
            engine_stop(g);
            pthread_cond_signal(&g->wake);
        }
        pthread_mutex_unlock(&g->lock);
    }
    Py_RETURN_NONE;
}

static PyObject *gate_take_error(PyObject *self, PyObject *unused)
{
    Gate *g = (Gate *)self;
    (void)unused;
    PyObject *error = g->error != NULL ? g->error : Py_NewRef(Py_None);
    g->error = NULL;
    return Py_BuildValue("(Ni)", error, g->engine_error);
}

static PyObject *gate_hooks(PyObject *self, PyObject *unused)
{
    (void)unused;
    return Py_BuildValue(
        "{sKsKsKsKsKsKsKsKsKsKsK}",
        "exception", (unsigned long long)(uintptr_t)on_exception,
        "invalid", (unsigned long long)(uintptr_t)on_invalid_instruction,
        "syscall", (unsigned long long)(uintptr_t)on_syscall,
        "in", (unsigned long long)(uintptr_t)on_in,
        "out", (unsigned long long)(uintptr_t)on_out,
        "cpuid", (unsigned long long)(uintptr_t)on_cpuid,
        "mmio_read", (unsigned long long)(uintptr_t)on_mmio_read,
        "mmio_write", (unsigned long long)(uintptr_t)on_mmio_write,
        "vector_read", (unsigned long long)(uintptr_t)on_vector_read,
        "vector_write", (unsigned long long)(uintptr_t)on_vector_write,
        "user", (unsigned long long)(uintptr_t)self);
}

static PyObject *gate_mmio_window(PyObject *self, PyObject *argument)
{
    Gate *g = (Gate *)self;
    uint64_t base = PyLong_AsUnsignedLongLong(argument);
    if (PyErr_Occurred())
        return NULL;
    MmioWindow *window = malloc(sizeof *window);
    if (window == NULL)
        return PyErr_NoMemory();
    *window = (MmioWindow){g, base, g->windows};
    g->windows = window;
    return PyLong_FromUnsignedLongLong((uintptr_t)window);
}

/* (halted, inflight vector or -1, exception or -1, its code, NMI pending): what lies outside the engine. */
static PyObject *gate_get_events(PyObject *self, PyObject *unused)
{
    Gate *g = (Gate *)self;
    (void)unused;
    return Py_BuildValue("(NiiIN)", PyBool_FromLong(g->halted), g->inflight, g->exception, g->exception_code,
                         PyBool_FromLong(g->nmi_pending));
}

static PyObject *gate_set_events(PyObject *self, PyObject *arguments)
{
    Gate *g = (Gate *)self;
    int halted, inflight, exception, nmi;
    unsigned int code;
    if (!PyArg_ParseTuple(arguments, "piiIp", &halted, &inflight, &exception, &code, &nmi))
        return NULL;
    g->halted = halted;
    g->inflight = inflight;
    g->exception = exception;
    g->exception_code = code;
    g->nmi_pending = nmi;
    REQUEST(g) = 0;
    Py_RETURN_NONE;
}

static PyObject *gate_close(PyObject *self, PyObject *unused)
{
    (void)unused;
    stop_pacer((Gate *)self);
    Py_RETURN_NONE;
}

static PyObject *gate_new(PyTypeObject *type, PyObject *arguments, PyObject *keywords)
{
    const char *config;
    const char *rows;
    Py_ssize_t config_size, rows_size;
    int osxsave;
    PyObject *handlers[6];
    (void)keywords;
    if (!PyArg_ParseTuple(arguments, "y#y#pOOOOOO", &config, &config_size, &rows, &rows_size, &osxsave, &handlers[0],
                          &handlers[1], &handlers[2], &handlers[3], &handlers[4], &handlers[5]))
        return NULL;
    if (config_size != sizeof(Config) || rows_size % sizeof(CpuidRow)) {
        PyErr_SetString(PyExc_ValueError, "configuration of another version");
        return NULL;
    }
    Gate *g = (Gate *)type->tp_alloc(type, 0);
    if (g == NULL)
        return NULL;
    memcpy(&g->c, config, sizeof g->c);
    g->env = (uint8_t *)(uintptr_t)g->c.env;
    g->port_read = Py_NewRef(handlers[0]);
    g->port_write = Py_NewRef(handlers[1]);
    g->mmio_read = Py_NewRef(handlers[2]);
    g->mmio_write = Py_NewRef(handlers[3]);
    g->pending = Py_NewRef(handlers[4]);
    g->acknowledge = Py_NewRef(handlers[5]);
    g->cpuid_osxsave = osxsave;
    g->inflight = g->exception = -1;
    g->cpuid_rows = rows_size / (Py_ssize_t)sizeof(CpuidRow);
    g->cpuid = malloc(rows_size ? (size_t)rows_size : 1);
    if (g->cpuid == NULL) {
        Py_DECREF(g);
        return PyErr_NoMemory();
    }
    memcpy(g->cpuid, rows, (size_t)rows_size);
    if (!start_pacer(g)) {
        Py_DECREF(g);
        PyErr_SetString(PyExc_OSError, "cannot start the pacer thread");
        return NULL;
    }
    return (PyObject *)g;
}

static int gate_traverse(PyObject *self, visitproc visit, void *arg)
{
    Gate *g = (Gate *)self;
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(g->port_read);
    Py_VISIT(g->port_write);
    Py_VISIT(g->mmio_read);
    Py_VISIT(g->mmio_write);
    Py_VISIT(g->pending);
    Py_VISIT(g->acknowledge);
    Py_VISIT(g->error);
    return 0;
}

static int gate_clear(PyObject *self)
{
    Gate *g = (Gate *)self;
    Py_CLEAR(g->port_read);
    Py_CLEAR(g->port_write);
    Py_CLEAR(g->mmio_read);
    Py_CLEAR(g->mmio_write);
    Py_CLEAR(g->pending);
    Py_CLEAR(g->acknowledge);
    Py_CLEAR(g->error);
    return 0;
}

static void gate_dealloc(PyObject *self)
{
    Gate *g = (Gate *)self;
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    stop_pacer(g);
    gate_clear(self);
    free(g->cpuid);
    while (g->windows != NULL) {
        MmioWindow *next = g->windows->next;
        free(g->windows);
        g->windows = next;
    }
    type->tp_free(self);
    Py_DECREF(type);
}

static PyMethodDef gate_methods[] = {
    {"run", gate_run, METH_O, "run(deadline_ns | None) -> exit code"},
    {"kick", gate_kick, METH_NOARGS, "End the present or the next run soon; any thread."},
    {"take_error", gate_take_error, METH_NOARGS, "(exception | None, engine's error code) of the last run."},
    {"hooks", gate_hooks, METH_NOARGS, "Addresses of the callbacks by name, and their user pointer."},
    {"mmio_window", gate_mmio_window, METH_O, "User pointer for the MMIO callbacks of a window at this address."},
    {"get_events", gate_get_events, METH_NOARGS, "(halted, inflight, exception, code, nmi_pending)"},
    {"set_events", gate_set_events, METH_VARARGS, "The inverse of get_events."},
    {"close", gate_close, METH_NOARGS, "Stop the pacer; idempotent."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot gate_slots[] = {
    {Py_tp_new, gate_new},         {Py_tp_dealloc, gate_dealloc}, {Py_tp_methods, gate_methods},
    {Py_tp_traverse, gate_traverse}, {Py_tp_clear, gate_clear},     {0, NULL},
};

static PyType_Spec gate_spec = {
    "vmf_cpu_unicorn._gate.Gate", sizeof(Gate), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC, gate_slots};

static int module_exec(PyObject *module)
{
    PyObject *type = PyType_FromSpec(&gate_spec);
    if (type == NULL || PyModule_AddObject(module, "Gate", type) < 0) {
        Py_XDECREF(type);
        return -1;
    }
    return PyModule_AddIntConstant(module, "CONFIG_SIZE", sizeof(Config));
}

static PyModuleDef_Slot module_slots[] = {{Py_mod_exec, module_exec}, {0, NULL}};

static struct PyModuleDef module_definition = {
    PyModuleDef_HEAD_INIT, .m_name = "vmf_cpu_unicorn._gate", .m_doc = "Native gate of the Unicorn backend.",
    .m_slots = module_slots};

PyMODINIT_FUNC PyInit__gate(void)
{
    return PyModuleDef_Init(&module_definition);
}
