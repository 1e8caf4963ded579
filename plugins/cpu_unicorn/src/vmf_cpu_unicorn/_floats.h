/* What the rooms of the floating-point helpers share. Their theory: the top of _floats.c.
 *
 *   _floats.c        the module, and what both kinds of instructions need
 *   _floats_sse.c    SSE to SSE4.2
 *   _floats_x87.c    x87: arithmetic, comparisons, functions
 *   _floats_moves.c  x87: loads, stores, the stack, control state, and what MMX shares of it
 */
#ifndef VMF_FLOATS_H
#define VMF_FLOATS_H

#include "_slots.h" /* first: it asks for GNU's dlinfo */

#include <stddef.h>

/* The exception flags of MXCSR and of the x87 status word, and the masks of the x87 control word: SDM vol. 1 8.1.3,
 * 8.1.5, 10.2.3. */
#define FLAG_IE 0x01u
#define FLAG_DE 0x02u
#define FLAG_ZE 0x04u
#define FLAG_OE 0x08u
#define FLAG_UE 0x10u
#define FLAG_PE 0x20u
#define FLAGS 0x3fu
#define FLAGS_BEFORE (FLAG_IE | FLAG_DE | FLAG_ZE) /* found before the operation is done, which then is not */

#define CR0_NE (1u << 5)
#define CR4_OSXMMEXCPT (1u << 10)
#define VECTOR_UD 6
#define VECTOR_GP 13
#define VECTOR_MF 16
#define VECTOR_XM 19

/* RFLAGS */
#define FLAG_CARRY 0x001u
#define FLAG_PARITY 0x004u
#define FLAG_ZERO 0x040u
#define FLAG_SIGN 0x080u
#define FLAG_OVERFLOW 0x800u

/* Filled by host_floats.py in this very order; every member is 8 bytes wide. */
typedef struct {
    uint64_t raise_exception_ra, raise_exception_err_ra; /* functions */
    uint64_t lduw, ldl, ldq, stw, stl, stq;                        /* cpu_*_data_ra */
    uint64_t regs, cc_src, cr, mxcsr, xmm;                        /* offsets in env */
    uint64_t fpstt, fpus, fpuc, fptags, fpregs, fpcs, fpds, fpip, fpdp, ft0;
} FloatsConfig;

extern FloatsConfig floats_at __attribute__((visibility("hidden")));

#define AT16(env, field) (*(uint16_t *)((env) + floats_at.field))
#define AT32(env, field) (*(uint32_t *)((env) + floats_at.field))
#define AT64(env, field) (*(uint64_t *)((env) + floats_at.field))
#define CONTROL(env, n) (((uint64_t *)((env) + floats_at.cr))[n])

/* A helper's return address: the engine finds the guest's instruction by it. Only in what translated code calls. */
#define CALLER ((uintptr_t)__builtin_return_address(0))

/* These leave by longjmp. */
static inline void raise_at(uint8_t *env, int vector, uintptr_t caller)
{
    ((void (*)(uint8_t *, int, uintptr_t))(uintptr_t)floats_at.raise_exception_ra)(env, vector, caller);
}

static inline void raise_code_at(uint8_t *env, int vector, int code, uintptr_t caller)
{
    ((void (*)(uint8_t *, int, int, uintptr_t))(uintptr_t)floats_at.raise_exception_err_ra)(env, vector, code, caller);
}

static inline uint64_t load_guest(uint64_t function, uint8_t *env, uint64_t address, uintptr_t caller)
{
    return ((uint64_t(*)(uint8_t *, uint64_t, uintptr_t))(uintptr_t)function)(env, address, caller);
}

static inline void store_guest(uint64_t function, uint8_t *env, uint64_t address, uint64_t value, uintptr_t caller)
{
    ((void (*)(uint8_t *, uint64_t, uint64_t, uintptr_t))(uintptr_t)function)(env, address, value, caller);
}

static inline uint32_t host_mxcsr(void)
{
    uint32_t value;
    __asm__ volatile("stmxcsr %0" : "=m"(value));
    return value;
}

static inline void set_host_mxcsr(uint32_t value)
{
    __asm__ volatile("ldmxcsr %0" ::"m"(value));
}

/* Raises what is pending in the x87, and makes its registers MMX registers (_floats_moves.c). */
void floats_enter_mmx(uint8_t *env, uintptr_t caller);

/* The helpers that a room replaces, for the processor that this runs on. */
size_t floats_sse_slots(const Slot **slots);
size_t floats_x87_slots(const Slot **slots);
size_t floats_moves_slots(const Slot **slots);

#endif
