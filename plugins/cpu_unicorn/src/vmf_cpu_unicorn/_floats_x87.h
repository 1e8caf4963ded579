/* x87 by the host's own x87: what its rooms share, and its theory; see the top of _floats.c, too.
 *
 *   _floats_x87.c        the three ways, arithmetic, comparisons, functions
 *   _floats_moves.c      loads, stores, the stack, control state
 *
 * Three ways lead there, from the most exact to the quickest:
 *   - `whole`: the guest's eight registers with tags and stack pointer are loaded as they are, one instruction is done,
 *     and all is taken back. Overflow and underflow of the stack come out right by themselves.
 *   - `pair`: the same with two registers, ST(0) and ST(i) as ST(1). For instructions with a register's number in them.
 *   - `quick`: ST(0), and ST(i) if there is one, are pushed onto the host's empty stack, when all exceptions are masked,
 *     no register is empty, and no new flag came of it (as in _floats_sse.c).
 *
 * The translator makes some instructions of several helpers: load an operand into FT0, compute, store, pop. What one
 * of them must tell the next stands in FT0's place, which the engine's own helpers no longer use:
 *   - which operand it is (`Operand`): its bytes as they came from memory, or a register's number;
 *   - a `Note`: that the instruction has not been done, so that nothing is to be popped; or what became of a push.
 *
 * An instruction that waits raises what is pending first. The first of its helpers does (`begin`), and no other one:
 * what an instruction raises itself is for the next.
 */
#ifndef VMF_FLOATS_X87_H
#define VMF_FLOATS_X87_H

#include "_floats.h"

#define CONTROL_USUAL 0x37fu    /* what the host's threads have: all masked, 64 bits of precision, to nearest */
#define CONTROL_KEPT 0x1f3fu
#define CONTROL_ALWAYS 0x40u
#define STATUS_STACK 0x40u      /* SF, with IE */
#define STATUS_STICKY 0x7fu
#define STATUS_SUMMARY 0x8080u  /* ES and B */
#define STATUS_C1 0x200u
#define STATUS_C2 0x400u
#define STATUS_CODES 0x4700u

/* FXSAVE's area, SDM vol. 1 table 10-2. */
typedef struct {
    uint16_t control, status;
    uint8_t tags, reserved;
    uint16_t opcode;
    uint64_t instruction, data;
    uint32_t mxcsr, mxcsr_mask;
    uint8_t st[8][16], xmm[16][16], rest[96];
} __attribute__((aligned(16))) Area;

typedef enum { REGISTER, SINGLE, DOUBLE, INTEGER, NOTHING } Kind;
typedef enum { NO_NOTE, NOT_DONE, PUSHED, PUSHED_NAN, NOT_PUSHED } Note;

/* In FT0's place. */
typedef struct {
    uint64_t bytes;
    uint8_t kind, number, note;
} Operand;

/* An instruction; `memory` is where its operand is, or where its result is to go. */
typedef void (*Instruction)(void *memory);

static const uint8_t indefinite[10] = {0, 0, 0, 0, 0, 0, 0, 0xc0, 0xff, 0xff};

static inline Operand *operand_of(uint8_t *env)
{
    return (Operand *)(env + floats_at.ft0);
}

static inline unsigned physical(uint8_t *env, int number)
{
    return (AT32(env, fpstt) + (unsigned)number) & 7;
}

static inline uint8_t *st(uint8_t *env, int number)
{
    return env + floats_at.fpregs + 16 * physical(env, number);
}

static inline uint8_t *tag(uint8_t *env, int number)
{
    return env + floats_at.fptags + physical(env, number);
}

static inline uint32_t pending(uint8_t *env)
{
    return AT16(env, fpus) & ~AT16(env, fpuc) & FLAGS;
}

static inline void summarize(uint8_t *env)
{
    AT16(env, fpus) = (uint16_t)((AT16(env, fpus) & ~STATUS_SUMMARY) | (pending(env) ? STATUS_SUMMARY : 0));
}

static inline void wait_first(uint8_t *env, uintptr_t caller)
{
    if (__builtin_expect(pending(env), 0) && CONTROL(env, 0) & CR0_NE)
        raise_at(env, VECTOR_MF, caller);
}

static inline void begin(uint8_t *env, uintptr_t caller)
{
    wait_first(env, caller);
    operand_of(env)->note = NO_NOTE;
}

/* ---- the three ways  -------------------------------------------------------------------------------------------- */

/* `memory` is the instruction's operand. */
void whole(uint8_t *env, Instruction instruction, void *memory);

/* For what stores to memory: the engine stores and pops afterwards, so registers and tags stay. */
void whole_to_memory(uint8_t *env, Instruction instruction, void *memory);

/* The same, and nothing is taken over: gives the status. */
uint16_t whole_status(uint8_t *env, Area *area, Instruction instruction, void *memory);

/* Flags, codes, and that they are to be raised. `undone`: the flags that keep the instruction from being done. */
void take_status(uint8_t *env, uint16_t status, uint32_t undone);

/* ST(0) and ST(`number`) as ST(1). */
void pair(uint8_t *env, int number, Instruction instruction, void *memory);

/* Whether the host's flags are none that the guest lacks; the condition codes that the instruction sets (`codes`) are
 * taken over then. */
static inline bool accepted(uint8_t *env, uint16_t status, uint32_t codes)
{
    if (status & ~AT16(env, fpus) & STATUS_STICKY)
        return false;
    AT16(env, fpus) = (uint16_t)((AT16(env, fpus) & ~codes) | (status & codes));
    return true;
}

/* Around what is done quickly: the guest's precision and rounding, which mostly are the host's. */
static inline bool quick_begin(uint8_t *env)
{
    if ((AT16(env, fpuc) & FLAGS) != FLAGS)
        return false;
    if (AT16(env, fpuc) != CONTROL_USUAL)
        __asm__ volatile("fldcw %0" ::"m"(AT16(env, fpuc)));
    return true;
}

static inline uint16_t quick_end(uint8_t *env)
{
    uint16_t status;
    __asm__ volatile("fnstsw %0" : "=a"(status)::"memory");
    if (AT16(env, fpuc) != CONTROL_USUAL)
        __asm__ volatile("fldcw %0" ::"m"((const uint16_t){CONTROL_USUAL}));
    return status;
}

static inline bool quick_one(uint8_t *env, Instruction instruction, uint32_t codes, void *memory, void *result)
{
    if (*tag(env, 0) || !quick_begin(env))
        return false;
    __asm__ volatile("fldt %0" ::"m"(*(const uint8_t(*)[10])st(env, 0)));
    instruction(memory);
    uint16_t status = quick_end(env);
    __asm__ volatile("fstpt %0" : "=m"(*(uint8_t(*)[10])result));
    return accepted(env, status, codes);
}

/* ST(0) and ST(`number`); `result` gets ST(`kept`). */
static inline bool quick_two(uint8_t *env, int number, Instruction instruction, uint32_t codes, void *memory,
                             void *result, int kept)
{
    if (*tag(env, 0) || *tag(env, number) || !quick_begin(env))
        return false;
    __asm__ volatile("fldt %0\n\tfldt %1" ::"m"(*(const uint8_t(*)[10])st(env, number)),
                     "m"(*(const uint8_t(*)[10])st(env, 0)));
    instruction(memory);
    uint16_t status = quick_end(env);
    if (kept)
        __asm__ volatile("fstp %%st(0)\n\tfstpt %0" : "=m"(*(uint8_t(*)[10])result));
    else
        __asm__ volatile("fstpt %0\n\tfstp %%st(0)" : "=m"(*(uint8_t(*)[10])result));
    return accepted(env, status, codes);
}

#define INSTRUCTION(name, text)                                                                                        \
    static void name(void *memory)                                                                                     \
    {                                                                                                                  \
        (void)memory;                                                                                                  \
        __asm__ volatile(text ::"r"(memory) : "memory", "cc");                                                         \
    }

#endif
