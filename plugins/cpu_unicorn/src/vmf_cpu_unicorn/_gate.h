/* What the rooms of the gate share: the gate itself, and the calls into the engine. Its theory: the top of _gate.c.
 *
 *   _gate.c         the object that Python sees, and its run loop
 *   _gate_hooks.c   what the engine calls
 *   _gate_pacer.c   the thread that ends slices
 */
#ifndef VMF_GATE_H
#define VMF_GATE_H

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
#define VECTOR_DB 1
#define VECTOR_UD 6
#define VECTOR_DF 8
#define VECTOR_GP 13

enum { EXIT_KICKED, EXIT_HALTED, EXIT_SHUTDOWN, EXIT_ERROR };

/* Filled by gate_native.py in this very order; every member is 8 bytes wide. */
typedef struct {
    uint64_t uc, cpu, env;
    uint64_t fn_emu_start, fn_emu_stop, fn_do_interrupt, fn_update_hflags, fn_cc_compute_all, fn_ldub_code;
    uint64_t fn_check_iob, fn_check_iow, fn_check_iol, fn_raise_exception_err, fn_cpu_loop_exit;
    uint64_t interrupt_request, icount_decr, halted, exception_index; /* addresses */
    uint64_t eip, eflags, cc_src, cc_op, df, hflags, hflags2, segs, cr, efer, star, lstar, cstar, fmask; /* offsets in env */
    uint64_t sysenter_cs, sysenter_esp, sysenter_eip;
    uint64_t exception_is_int, exception_next_eip, old_exception, vm_vmcb, vector_page;
    uint64_t amd; /* the contract's vendor is AMD's kind: which of SYSCALL and SYSENTER exists outside 64-bit mode */
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
    /* The pacer's, under `lock`. */
    pthread_t pacer;
    pthread_mutex_t lock;
    pthread_cond_t wake;
    bool pacer_runs, quit, in_slice;
    int64_t deadline, asleep_until; /* CLOCK_MONOTONIC, ns */
    atomic_bool kicked;
    atomic_bool entered; /* the engine has called us in this slice: it certainly runs */
};

#define ENV32(g, field) (*(uint32_t *)((g)->env + (g)->c.field))
#define ENV64(g, field) (*(uint64_t *)((g)->env + (g)->c.field))
#define REG(g, n) (((uint64_t *)(g)->env)[n])
#define REQUEST(g) (*(volatile uint32_t *)(uintptr_t)(g)->c.interrupt_request)

enum { RAX, RCX, RDX, RBX, RSP, R11 = 11 };
enum { SEG_CS = 1, SEG_SS = 2 };

static inline int64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

/* ---- calls into the engine ------------------------------------------------------------------------------------ */

static inline void engine_stop(Gate *g)
{
    ((int (*)(void *))(uintptr_t)g->c.fn_emu_stop)((void *)(uintptr_t)g->c.uc);
}

/* Make the engine look at interrupt_request at the next block start. vCPU thread only. */
static inline void engine_poke(Gate *g)
{
    ((volatile uint16_t *)(uintptr_t)g->c.icount_decr)[1] = 0xffff;
}

static inline void engine_update_hflags(Gate *g)
{
    ((void (*)(void *))(uintptr_t)g->c.fn_update_hflags)(g->env);
    ENV32(g, hflags) &= ~HF_COPIES;
}

/* Does not return: longjmp to the engine's loop, which delivers it. */
static inline void engine_raise(Gate *g, int vector, uint32_t code)
{
    ((void (*)(void *, int, int))(uintptr_t)g->c.fn_raise_exception_err)(g->env, vector, (int)code);
}

static inline uint32_t engine_flags(Gate *g)
{
    uint32_t arithmetic =
        ((uint32_t (*)(void *, int))(uintptr_t)g->c.fn_cc_compute_all)(g->env, (int)ENV32(g, cc_op));
    return (uint32_t)ENV64(g, eflags) | arithmetic | (ENV32(g, df) & FLAG_DF);
}

/* ---- the GIL -------------------------------------------------------------------------------------------------- */

static inline void python_enter(Gate *g)
{
    atomic_store_explicit(&g->entered, true, memory_order_relaxed);
    PyEval_RestoreThread(g->thread);
}

static inline void python_leave(Gate *g)
{
    g->thread = PyEval_SaveThread();
}

/* ---- _gate_hooks.c -------------------------------------------------------------------------------------------- */

/* Whether INTR is asserted; -1 on error (kept). GIL held. */
int hooks_ask_pending(Gate *g);

/* A dict: what is to be registered with the engine, addresses by name, and their user pointer. */
PyObject *hooks_addresses(Gate *g);

/* ---- _gate_pacer.c -------------------------------------------------------------------------------------------- */

bool pacer_start(Gate *g);

/* Idempotent. GIL held; it is released while the thread ends. */
void pacer_stop(Gate *g);

/* Around the engine's run: until `deadline` (CLOCK_MONOTONIC, ns) or a kick. vCPU thread. */
void pacer_begin_slice(Gate *g, int64_t deadline);
void pacer_end_slice(Gate *g);

/* End the present slice or the next one; any thread. */
void pacer_kick(Gate *g);

#endif
