/* SSE to SSE4.2 by the host's own instructions. Theory: the top of _floats.c.
 *
 * An operation is a function of two vectors, the destination before and the source, that gives the destination after.
 * It is done at once, under the MXCSR that the thread happens to have, when three things hold: the guest's MXCSR asks
 * for nothing unusual, neither does the thread's, and no flag stands in the thread's that the guest has not got yet.
 * Flags are sticky, so the third means that this operation raised none that is new. Otherwise it is done once more,
 * with care: under the guest's own settings, with the flags cleared before and counted afterwards.
 */
#include "_floats.h"

typedef float V __attribute__((vector_size(16)));
typedef V (*Operation)(V destination, V source);

#define MXCSR_PLAIN 0x1f80u    /* all masked, to nearest, denormals as they are */
#define MXCSR_SETTINGS 0xffc0u
#define MXCSR_ALL 0xffffu
#define MXCSR_MASKS 0x1f80u
#define MXCSR_FLUSH 0x8000u

static inline V take(const void *at)
{
    V value;
    memcpy(&value, at, sizeof value);
    return value;
}

static inline void put(void *at, V value)
{
    memcpy(at, &value, sizeof value);
}

static inline V take_half(const void *at)
{
    uint64_t halves[2] = {0, 0};
    memcpy(halves, at, 8);
    return take(halves);
}

static inline V of_integer(uint64_t value)
{
    uint64_t halves[2] = {value, 0};
    return take(halves);
}

static inline uint64_t to_integer(V value)
{
    uint64_t halves[2];
    memcpy(halves, &value, sizeof halves);
    return halves[0];
}

static inline bool settled(uint8_t *env)
{
    uint32_t host = host_mxcsr(), guest = AT32(env, mxcsr);
    return !((host & ~guest & FLAGS) | ((host | guest) & MXCSR_SETTINGS & ~MXCSR_PLAIN) |
             (~(host & guest) & MXCSR_PLAIN));
}

/* The flags that the guest is to see of those that the operation raises when everything is masked. */
static uint32_t seen_flags(Operation operation, V destination, V source, uint32_t guest, uint32_t flags)
{
    uint32_t unmasked = ~(guest >> 7) & FLAGS;
    if (unmasked & FLAG_UE) {
        /* Unmasked, underflow is raised for a tiny result, be it exact or not (SDM vol. 1 4.9.1.5). Flushing raises it
         * for every tiny result. */
        set_host_mxcsr((guest & ~FLAGS) | MXCSR_MASKS | MXCSR_FLUSH);
        operation(destination, source);
        flags |= host_mxcsr() & FLAG_UE;
    }
    if (flags & unmasked & FLAGS_BEFORE)
        flags &= FLAGS_BEFORE; /* the operation was not done */
    return flags;
}

static __attribute__((noinline)) V with_care(uint8_t *env, Operation operation, V destination, V source, uintptr_t caller)
{
    uint32_t host = host_mxcsr() & ~FLAGS, guest = AT32(env, mxcsr);
    set_host_mxcsr((guest & ~FLAGS) | MXCSR_MASKS);
    V result = operation(destination, source);
    uint32_t flags = host_mxcsr() & FLAGS;
    if (~guest & MXCSR_MASKS)
        flags = seen_flags(operation, destination, source, guest, flags);
    set_host_mxcsr(host);
    AT32(env, mxcsr) = guest | flags;
    if (flags & ~(guest >> 7) & FLAGS)
        raise_at(env, CONTROL(env, 4) & CR4_OSXMMEXCPT ? VECTOR_XM : VECTOR_UD, caller);
    return result;
}

static inline __attribute__((always_inline)) V perform(uint8_t *env, Operation operation, V destination, V source,
                                                       uintptr_t caller)
{
    V result = operation(destination, source);
    return settled(env) ? result : with_care(env, operation, destination, source, caller);
}

/* ---- vector to vector ----------------------------------------------------------------------------------------- */

#define OPERATION(name, instruction)                                                                                   \
    static inline V do_##name(V d, V s)                                                                                \
    {                                                                                                                  \
        __asm__ volatile(instruction " %1, %0" : "+x"(d) : "x"(s));                                                    \
        return d;                                                                                                      \
    }
#define VECTORS(name, instruction)                                                                                     \
    OPERATION(name, instruction)                                                                                       \
    static void name(uint8_t *env, void *d, const void *s)                                                             \
    {                                                                                                                  \
        put(d, perform(env, do_##name, take(d), take(s), CALLER));                                                     \
    }
#define FOUR(name)                                                                                                     \
    VECTORS(name##ps, #name "ps") VECTORS(name##ss, #name "ss") VECTORS(name##pd, #name "pd")                          \
    VECTORS(name##sd, #name "sd")
#define COMPARISON(name)                                                                                               \
    VECTORS(cmp##name##ps, "cmp" #name "ps") VECTORS(cmp##name##ss, "cmp" #name "ss")                                  \
    VECTORS(cmp##name##pd, "cmp" #name "pd") VECTORS(cmp##name##sd, "cmp" #name "sd")

FOUR(add) FOUR(sub) FOUR(mul) FOUR(div) FOUR(min) FOUR(max) FOUR(sqrt)
COMPARISON(eq) COMPARISON(lt) COMPARISON(le) COMPARISON(unord)
COMPARISON(neq) COMPARISON(nlt) COMPARISON(nle) COMPARISON(ord)
VECTORS(cvtpd2ps, "cvtpd2ps") VECTORS(cvtss2sd, "cvtss2sd") VECTORS(cvtsd2ss, "cvtsd2ss")
VECTORS(cvtdq2ps, "cvtdq2ps") VECTORS(cvtps2dq, "cvtps2dq") VECTORS(cvtpd2dq, "cvtpd2dq")
VECTORS(cvttps2dq, "cvttps2dq") VECTORS(cvttpd2dq, "cvttpd2dq")
VECTORS(haddps, "haddps") VECTORS(haddpd, "haddpd") VECTORS(hsubps, "hsubps") VECTORS(hsubpd, "hsubpd")
VECTORS(addsubps, "addsubps") VECTORS(addsubpd, "addsubpd")

/* These read half of the source: the rest of it may be what an earlier instruction left. */
OPERATION(cvtps2pd, "cvtps2pd")
OPERATION(cvtdq2pd, "cvtdq2pd")

static void cvtps2pd(uint8_t *env, void *d, const void *s)
{
    put(d, perform(env, do_cvtps2pd, take(d), take_half(s), CALLER));
}

static void cvtdq2pd(uint8_t *env, void *d, const void *s)
{
    put(d, perform(env, do_cvtdq2pd, take(d), take_half(s), CALLER));
}

/* Approximations: no flags, no settings. */
#define APPROXIMATION(name)                                                                                            \
    OPERATION(name, #name)                                                                                             \
    static void name(uint8_t *env, void *d, const void *s)                                                             \
    {                                                                                                                  \
        (void)env;                                                                                                     \
        put(d, do_##name(take(d), take(s)));                                                                           \
    }
APPROXIMATION(rcpps) APPROXIMATION(rcpss) APPROXIMATION(rsqrtps) APPROXIMATION(rsqrtss)

/* ---- with MMX and general registers ----------------------------------------------------------------------------
 * The forms for MMX registers are done by those for vectors whose upper half is zero: the host's own MMX registers
 * are its x87 registers.
 */

static void cvtpi2ps(uint8_t *env, void *d, const void *s)
{
    V result = perform(env, do_cvtdq2ps, take(d), take_half(s), CALLER);
    memcpy(d, &result, 8);
}

static void cvtpi2pd(uint8_t *env, void *d, const void *s)
{
    put(d, perform(env, do_cvtdq2pd, take(d), take_half(s), CALLER));
}

#define TO_MMX(name, by, taken)                                                                                        \
    static void name(uint8_t *env, void *d, const void *s)                                                             \
    {                                                                                                                  \
        V result = perform(env, do_##by, take(s), taken(s), CALLER);                                                   \
        memcpy(d, &result, 8);                                                                                         \
    }
TO_MMX(cvtps2pi, cvtps2dq, take_half)
TO_MMX(cvttps2pi, cvttps2dq, take_half)
TO_MMX(cvtpd2pi, cvtpd2dq, take)
TO_MMX(cvttpd2pi, cvttpd2dq, take)

#define FROM_INTEGER(name, instruction, type)                                                                          \
    static inline V do_##name(V d, V s)                                                                                \
    {                                                                                                                  \
        type value = (type)to_integer(s);                                                                              \
        __asm__ volatile(instruction " %1, %0" : "+x"(d) : "r"(value));                                                \
        return d;                                                                                                      \
    }                                                                                                                  \
    static void name(uint8_t *env, void *d, type value)                                                                \
    {                                                                                                                  \
        put(d, perform(env, do_##name, take(d), of_integer((uint64_t)value), CALLER));                                 \
    }
FROM_INTEGER(cvtsi2ss, "cvtsi2ssl", uint32_t)
FROM_INTEGER(cvtsi2sd, "cvtsi2sdl", uint32_t)
FROM_INTEGER(cvtsq2ss, "cvtsi2ssq", uint64_t)
FROM_INTEGER(cvtsq2sd, "cvtsi2sdq", uint64_t)

#define TO_INTEGER(name, instruction, type)                                                                            \
    static inline V do_##name(V d, V s)                                                                                \
    {                                                                                                                  \
        type value;                                                                                                    \
        (void)d;                                                                                                       \
        __asm__ volatile(instruction " %1, %0" : "=r"(value) : "x"(s));                                                \
        return of_integer((uint64_t)value);                                                                            \
    }                                                                                                                  \
    static type name(uint8_t *env, const void *s)                                                                      \
    {                                                                                                                  \
        V source = take(s);                                                                                            \
        return (type)to_integer(perform(env, do_##name, source, source, CALLER));                                      \
    }
TO_INTEGER(cvtss2si, "cvtss2si", uint32_t)
TO_INTEGER(cvtsd2si, "cvtsd2si", uint32_t)
TO_INTEGER(cvtss2sq, "cvtss2si", uint64_t)
TO_INTEGER(cvtsd2sq, "cvtsd2si", uint64_t)
TO_INTEGER(cvttss2si, "cvttss2si", uint32_t)
TO_INTEGER(cvttsd2si, "cvttsd2si", uint32_t)
TO_INTEGER(cvttss2sq, "cvttss2si", uint64_t)
TO_INTEGER(cvttsd2sq, "cvttsd2si", uint64_t)

/* ZF, PF and CF are the result, OF, SF and AF become 0. */
#define FLAGS_OF(name)                                                                                                 \
    static inline V do_##name(V d, V s)                                                                                \
    {                                                                                                                  \
        bool zero, parity, carry;                                                                                      \
        __asm__ volatile(#name " %4, %3" : "=@ccz"(zero), "=@ccp"(parity), "=@ccc"(carry) : "x"(d), "x"(s));           \
        return of_integer((zero ? FLAG_ZERO : 0) | (parity ? FLAG_PARITY : 0) | (carry ? FLAG_CARRY : 0));             \
    }                                                                                                                  \
    static void name(uint8_t *env, const void *d, const void *s)                                                       \
    {                                                                                                                  \
        AT64(env, cc_src) = to_integer(perform(env, do_##name, take(d), take(s), CALLER));                             \
    }
FLAGS_OF(comiss) FLAGS_OF(comisd) FLAGS_OF(ucomiss) FLAGS_OF(ucomisd)

/* ---- with an immediate -----------------------------------------------------------------------------------------
 * One little function for every value. They follow the calling convention: vectors in XMM0 and XMM1, result in XMM0.
 */

#define STUB_BYTES 16
#define STUBS(name, instruction, values)                                                                               \
    __asm__(".text\n.balign 16\nstubs_" #name ":\n.set value, 0\n.rept " #values "\n" instruction                       \
            " $value, %xmm1, %xmm0\nret\n.balign 16, 0xcc\n.set value, value + 1\n.endr\n");                           \
    extern const char stubs_##name[] __attribute__((visibility("hidden")))

#define BY_IMMEDIATE(name, values)                                                                                     \
    STUBS(name, #name, values);                                                                                        \
    static void name(uint8_t *env, void *d, const void *s, uint32_t immediate)                                         \
    {                                                                                                                  \
        Operation operation = (Operation)(uintptr_t)(stubs_##name + STUB_BYTES * (immediate & (values - 1)));          \
        put(d, perform(env, operation, take(d), take(s), CALLER));                                                     \
    }
BY_IMMEDIATE(roundps, 16)
BY_IMMEDIATE(roundpd, 16)
BY_IMMEDIATE(roundss, 16)
BY_IMMEDIATE(roundsd, 16)
BY_IMMEDIATE(dpps, 256)
BY_IMMEDIATE(dppd, 256)

/* ---- integers: what the engine does wrongly when source and destination are one -------------------------------- */

#define HORIZONTAL(name)                                                                                               \
    OPERATION(name, #name)                                                                                             \
    static void name##_xmm(uint8_t *env, void *d, const void *s)                                                       \
    {                                                                                                                  \
        (void)env;                                                                                                     \
        put(d, do_##name(take(d), take(s)));                                                                           \
    }                                                                                                                  \
    static void name##_mmx(uint8_t *env, void *d, const void *s)                                                       \
    {                                                                                                                  \
        uint64_t both[2];                                                                                              \
        floats_enter_mmx(env, CALLER);                                                                                 \
        memcpy(&both[0], d, 8);                                                                                        \
        memcpy(&both[1], s, 8);                                                                                        \
        uint64_t result = to_integer(do_##name(take(both), take(both)));                                               \
        memcpy(d, &result, 8);                                                                                         \
    }
HORIZONTAL(phaddw) HORIZONTAL(phaddd) HORIZONTAL(phaddsw) HORIZONTAL(phsubw) HORIZONTAL(phsubd) HORIZONTAL(phsubsw)

/* ---- strings --------------------------------------------------------------------------------------------------- */

/* The lengths of PCMPESTRI and PCMPESTRM: the instructions take them for 16 when they are more, either way. */
static int32_t length_of(uint8_t *env, int which, uint32_t immediate)
{
    uint64_t value = ((uint64_t *)(env + floats_at.regs))[which];
    int64_t length = immediate >> 8 ? (int64_t)value : (int32_t)value; /* bit 8 is REX.W */
    return length > 16 ? 16 : length < -16 ? -16 : (int32_t)length;
}

/* Bits 0 to 6 of the immediate count. The lengths of the explicit forms come in EDI and ESI. */
#define STRING_STUBS(name, prepare, give)                                                                              \
    __asm__(".text\n.balign 32\nstubs_" #name ":\n.set value, 0\n.rept 128\n" prepare #name                            \
            " $value, %xmm1, %xmm0\n" give "ret\n.balign 32, 0xcc\n.set value, value + 1\n.endr\n");                   \
    extern const char stubs_##name[] __attribute__((visibility("hidden")))
#define WITH_LENGTHS "mov %edi, %eax\nmov %esi, %edx\n"
#define GIVE_INDEX_AND_FLAGS "pushfq\npop %rax\nshl $32, %rcx\nor %rcx, %rax\n"
STRING_STUBS(pcmpistri, "", GIVE_INDEX_AND_FLAGS);
STRING_STUBS(pcmpestri, WITH_LENGTHS, GIVE_INDEX_AND_FLAGS);
STRING_STUBS(pcmpistrm, "", "");
STRING_STUBS(pcmpestrm, WITH_LENGTHS, "");

#define STUB_OF(stubs, immediate) ((uintptr_t)(stubs) + 32 * ((immediate) & 127))
#define STRING_FLAGS (FLAG_CARRY | FLAG_ZERO | FLAG_SIGN | FLAG_OVERFLOW)
enum { RAX, RCX, RDX };

static uint64_t index_and_flags(uintptr_t stub, V d, V s, int32_t first, int32_t second)
{
    return ((uint64_t(*)(V, V, int32_t, int32_t))stub)(d, s, first, second);
}

/* The forms that give an index and those that give a mask set the same flags. */
#define STRINGS(kind, first, second)                                                                                   \
    static void pcmp##kind##i(uint8_t *env, const void *d, const void *s, uint32_t immediate)                          \
    {                                                                                                                  \
        uintptr_t stub = STUB_OF(stubs_pcmp##kind##i, immediate);                                                      \
        uint64_t both = index_and_flags(stub, take(d), take(s), first, second);                                        \
        AT64(env, cc_src) = both & STRING_FLAGS;                                                                       \
        ((uint64_t *)(env + floats_at.regs))[RCX] = both >> 32;                                                        \
    }                                                                                                                  \
    static void pcmp##kind##m(uint8_t *env, const void *d, const void *s, uint32_t immediate)                          \
    {                                                                                                                  \
        uintptr_t stub = STUB_OF(stubs_pcmp##kind##i, immediate), mask = STUB_OF(stubs_pcmp##kind##m, immediate);      \
        V left = take(d), right = take(s);                                                                             \
        AT64(env, cc_src) = index_and_flags(stub, left, right, first, second) & STRING_FLAGS;                          \
        put(env + floats_at.xmm, ((V(*)(V, V, int32_t, int32_t))mask)(left, right, first, second));                    \
    }
STRINGS(istr, 0, 0)
STRINGS(estr, length_of(env, RAX, immediate), length_of(env, RDX, immediate))

/* ---- MXCSR ------------------------------------------------------------------------------------------------------ */

static SlotFunction engine_ldmxcsr, engine_fxrstor;

/* These two end in the engine's own, which must find our caller's address as its own: calls in tail position. */
static void ldmxcsr(uint8_t *env, uint32_t value)
{
    if (value & ~MXCSR_ALL)
        raise_code_at(env, VECTOR_GP, 0, CALLER);
    ((void (*)(uint8_t *, uint32_t))engine_ldmxcsr)(env, value);
}

static void fxrstor(uint8_t *env, uint64_t address)
{
    uintptr_t caller = CALLER;
    if (!(address & 15) && (uint32_t)load_guest(floats_at.ldl, env, address + 24, caller) & ~MXCSR_ALL)
        raise_code_at(env, VECTOR_GP, 0, caller);
    ((void (*)(uint8_t *, uint64_t))engine_fxrstor)(env, address);
}

/* ---- the table --------------------------------------------------------------------------------------------------- */

#define SLOT(name, function) {"helper_" #name, (SlotFunction)(function), NULL, NULL, 0}
#define SAME(name) SLOT(name, name)
#define SAME4(name) SAME(name##ps), SAME(name##ss), SAME(name##pd), SAME(name##sd)
#define XMM(name) SLOT(name##_xmm, name)
#define BOTH(name) SLOT(name##_xmm, name##_xmm), SLOT(name##_mmx, name##_mmx)

static const Slot sse_slots[] = {
    SAME4(add), SAME4(sub), SAME4(mul), SAME4(div), SAME4(min), SAME4(max), SAME4(sqrt),
    SAME4(cmpeq), SAME4(cmplt), SAME4(cmple), SAME4(cmpunord),
    SAME4(cmpneq), SAME4(cmpnlt), SAME4(cmpnle), SAME4(cmpord),
    SAME(cvtps2pd), SAME(cvtpd2ps), SAME(cvtss2sd), SAME(cvtsd2ss), SAME(cvtdq2ps), SAME(cvtdq2pd),
    SAME(cvtps2dq), SAME(cvtpd2dq), SAME(cvttps2dq), SAME(cvttpd2dq),
    SAME(cvtpi2ps), SAME(cvtpi2pd), SAME(cvtps2pi), SAME(cvtpd2pi), SAME(cvttps2pi), SAME(cvttpd2pi),
    SAME(cvtsi2ss), SAME(cvtsi2sd), SAME(cvtsq2ss), SAME(cvtsq2sd),
    SAME(cvtss2si), SAME(cvtsd2si), SAME(cvtss2sq), SAME(cvtsd2sq),
    SAME(cvttss2si), SAME(cvttsd2si), SAME(cvttss2sq), SAME(cvttsd2sq),
    SAME(comiss), SAME(comisd), SAME(ucomiss), SAME(ucomisd),
    SAME(rcpps), SAME(rcpss), SAME(rsqrtps), SAME(rsqrtss),
    SAME(haddps), SAME(haddpd), SAME(hsubps), SAME(hsubpd), SAME(addsubps), SAME(addsubpd),
    XMM(roundps), XMM(roundpd), XMM(roundss), XMM(roundsd), XMM(dpps), XMM(dppd),
    BOTH(phaddw), BOTH(phaddd), BOTH(phaddsw), BOTH(phsubw), BOTH(phsubd), BOTH(phsubsw),
    XMM(pcmpistri), XMM(pcmpistrm), XMM(pcmpestri), XMM(pcmpestrm),
    {"helper_ldmxcsr", (SlotFunction)ldmxcsr, &engine_ldmxcsr, NULL, 0},
    {"helper_fxrstor", (SlotFunction)fxrstor, &engine_fxrstor, NULL, 0},
};

/* All or none: a host without SSE4.2 keeps the engine's helpers. */
size_t floats_sse_slots(const Slot **slots)
{
    *slots = sse_slots;
    return sizeof sse_slots / sizeof *sse_slots;
}
