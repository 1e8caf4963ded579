/* x87: the three ways, arithmetic, comparisons and functions. Theory: the top of _floats_x87.h. */
#include "_floats_x87.h"

/* ---- the three ways -------------------------------------------------------------------------------------------- */

static __attribute__((noinline)) void execute(Area *area, Instruction instruction, void *memory)
{
    __asm__ volatile("stmxcsr %0" : "=m"(area->mxcsr));
    __asm__ volatile("fxrstor %0" ::"m"(*area)
                     : "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11",
                       "xmm12", "xmm13", "xmm14", "xmm15", "memory");
    instruction(memory);
    __asm__ volatile("fxsave %0\n\tfninit" : "=m"(*area)::"memory");
}

void take_status(uint8_t *env, uint16_t status, uint32_t undone)
{
    AT16(env, fpus) = (uint16_t)((AT16(env, fpus) & STATUS_STICKY) | (status & (STATUS_STICKY | STATUS_CODES)));
    summarize(env);
    if (status & undone & ~AT16(env, fpuc))
        operand_of(env)->note = NOT_DONE;
}

static void prepare(uint8_t *env, Area *area, unsigned top)
{
    memset(area, 0, offsetof(Area, st));
    area->control = AT16(env, fpuc);
    area->status = (uint16_t)((AT16(env, fpus) & STATUS_CODES) | top << 11);
}

uint16_t whole_status(uint8_t *env, Area *area, Instruction instruction, void *memory)
{
    prepare(env, area, AT32(env, fpstt) & 7);
    for (int n = 0; n < 8; n++) {
        memcpy(area->st[n], st(env, n), 16);
        area->tags |= (uint8_t)(!*tag(env, n) << physical(env, n));
    }
    execute(area, instruction, memory);
    return area->status;
}

void whole(uint8_t *env, Instruction instruction, void *memory)
{
    Area area;
    uint16_t status = whole_status(env, &area, instruction, memory);
    AT32(env, fpstt) = status >> 11 & 7;
    for (int n = 0; n < 8; n++) {
        memcpy(st(env, n), area.st[n], 10);
        *tag(env, n) = !(area.tags >> physical(env, n) & 1);
    }
    take_status(env, status, FLAGS_BEFORE);
}

void whole_to_memory(uint8_t *env, Instruction instruction, void *memory)
{
    Area area;
    take_status(env, whole_status(env, &area, instruction, memory), FLAGS_BEFORE | FLAG_OE | FLAG_UE);
}

void pair(uint8_t *env, int number, Instruction instruction, void *memory)
{
    Area area;
    prepare(env, &area, 6); /* ST(0) and ST(1) are registers 6 and 7 */
    memcpy(area.st[0], st(env, 0), 16);
    memcpy(area.st[1], st(env, number), 16);
    memset(area.st[2], 0, 6 * 16);
    area.tags = (uint8_t)(!*tag(env, 0) << 6 | !*tag(env, number) << 7);
    execute(&area, instruction, memory);
    if (number) {
        memcpy(st(env, number), area.st[1], 10);
        *tag(env, number) = !(area.tags & 1 << 7);
        memcpy(st(env, 0), area.st[0], 10);
        *tag(env, 0) = !(area.tags & 1 << 6);
    } else { /* both are the same register: the one that has changed counts */
        bool filled = *tag(env, 0) && area.tags >> 7;
        int changed = filled || memcmp(area.st[1], st(env, 0), 10) != 0;
        memcpy(st(env, 0), area.st[changed], 10);
        *tag(env, 0) = !(area.tags & 1 << (6 + changed));
    }
    take_status(env, area.status, FLAGS_BEFORE);
}

/* ---- arithmetic and comparisons ---------------------------------------------------------------------------------- */

/* By the kind of operand. */
typedef struct {
    Instruction by[NOTHING + 1];
} Forms;

static void operate(uint8_t *env, const Forms *forms, uint32_t codes)
{
    Operand *operand = operand_of(env);
    Instruction instruction = forms->by[operand->kind];
    uint8_t result[16];
    if (operand->kind == REGISTER) {
        if (quick_two(env, operand->number, instruction, codes, NULL, result, 0))
            memcpy(st(env, 0), result, 10);
        else
            pair(env, operand->number, instruction, NULL);
    } else {
        uint64_t bytes = operand->bytes;
        if (quick_one(env, instruction, codes, &bytes, result))
            memcpy(st(env, 0), result, 10);
        else
            whole(env, instruction, &bytes);
    }
}

#define ARITHMETIC(name, sti)                                                                                          \
    INSTRUCTION(name##_st, "f" #name " %%st(1), %%st")                                                                 \
    INSTRUCTION(name##_single, "f" #name "s (%0)")                                                                     \
    INSTRUCTION(name##_double, "f" #name "l (%0)")                                                                     \
    INSTRUCTION(name##_integer, "fi" #name "l (%0)")                                                                   \
    INSTRUCTION(name##_sti, sti)                                                                                       \
    static void f##name##_ST0_FT0(uint8_t *env)                                                                        \
    {                                                                                                                  \
        static const Forms forms = {{name##_st, name##_single, name##_double, name##_integer, name##_st}};             \
        operate(env, &forms, STATUS_C1);                                                                                          \
    }                                                                                                                  \
    static void f##name##_STN_ST0(uint8_t *env, int number)                                                            \
    {                                                                                                                  \
        uint8_t result[16];                                                                                            \
        begin(env, CALLER);                                                                                            \
        if (quick_two(env, number, name##_sti, STATUS_C1, NULL, result, 1))                                                       \
            memcpy(st(env, number), result, 10);                                                                       \
        else                                                                                                           \
            pair(env, number, name##_sti, NULL);                                                                       \
    }
/* ST(1) = ST(1) op ST(0), reversed where the name says so; as opcodes, because assemblers disagree about the names of
 * subtraction and division with two registers (SDM vol. 2, FSUB: DC E8+i is FSUB ST(i), ST(0)). */
ARITHMETIC(add, ".byte 0xdc, 0xc1")
ARITHMETIC(mul, ".byte 0xdc, 0xc9")
ARITHMETIC(sub, ".byte 0xdc, 0xe9")
ARITHMETIC(subr, ".byte 0xdc, 0xe1")
ARITHMETIC(div, ".byte 0xdc, 0xf9")
ARITHMETIC(divr, ".byte 0xdc, 0xf1")

INSTRUCTION(com_st, "fcom %%st(1)")
INSTRUCTION(com_single, "fcoms (%0)")
INSTRUCTION(com_double, "fcoml (%0)")
INSTRUCTION(com_integer, "ficoml (%0)")
INSTRUCTION(tst, "ftst")
INSTRUCTION(ucom_st, "fucom %%st(1)")

static void fcom_ST0_FT0(uint8_t *env)
{
    static const Forms forms = {{com_st, com_single, com_double, com_integer, tst}};
    operate(env, &forms, STATUS_CODES);
}

static void fucom_ST0_FT0(uint8_t *env)
{
    static const Forms forms = {{ucom_st, ucom_st, ucom_st, ucom_st, ucom_st}}; /* registers only */
    operate(env, &forms, STATUS_CODES);
}

/* ZF, PF and CF are the result, OF, SF and AF become 0 (AMD64 APM vol. 5, FCOMI). */
#define COMPARISON(name)                                                                                               \
    static void name##_st(void *memory)                                                                                \
    {                                                                                                                  \
        bool zero, parity, carry;                                                                                      \
        __asm__ volatile(#name " %%st(1), %%st" : "=@ccz"(zero), "=@ccp"(parity), "=@ccc"(carry)::"memory");           \
        *(uint64_t *)memory = (zero ? FLAG_ZERO : 0) | (parity ? FLAG_PARITY : 0) | (carry ? FLAG_CARRY : 0);          \
    }                                                                                                                  \
    static void name##_ST0_FT0(uint8_t *env)                                                                           \
    {                                                                                                                  \
        uint8_t result[16];                                                                                            \
        uint64_t flags;                                                                                                \
        int number = operand_of(env)->number;                                                                          \
        if (!quick_two(env, number, name##_st, 0, &flags, result, 0))                                                     \
            pair(env, number, name##_st, &flags);                                                                      \
        AT64(env, cc_src) = flags;                                                                                     \
    }
COMPARISON(fcomi)
COMPARISON(fucomi)

/* ---- operands ------------------------------------------------------------------------------------------------------ */

static inline void operand(uint8_t *env, Kind kind, uint64_t bytes, int number)
{
    Operand *o = operand_of(env);
    o->bytes = bytes;
    o->kind = (uint8_t)kind;
    o->number = (uint8_t)number;
}

static void flds_FT0(uint8_t *env, uint32_t value)
{
    begin(env, CALLER);
    operand(env, SINGLE, value, 0);
}

static void fldl_FT0(uint8_t *env, uint64_t value)
{
    begin(env, CALLER);
    operand(env, DOUBLE, value, 0);
}

static void fildl_FT0(uint8_t *env, int32_t value)
{
    begin(env, CALLER);
    operand(env, INTEGER, (uint32_t)value, 0);
}

static void fmov_FT0_STN(uint8_t *env, int number)
{
    begin(env, CALLER);
    operand(env, REGISTER, 0, number);
}

static void fldz_FT0(uint8_t *env)
{
    begin(env, CALLER);
    operand(env, NOTHING, 0, 0);
}

/* ---- functions of the stack ------------------------------------------------------------------------------------------ */

#define FUNCTION(helper, text)                                                                                         \
    INSTRUCTION(do_##helper, text)                                                                                     \
    static void helper(uint8_t *env)                                                                                   \
    {                                                                                                                  \
        begin(env, CALLER);                                                                                            \
        whole(env, do_##helper, NULL);                                                                                 \
    }
FUNCTION(fyl2x, "fyl2x") FUNCTION(fyl2xp1, "fyl2xp1") FUNCTION(fptan, "fptan") FUNCTION(fpatan, "fpatan")
FUNCTION(fxtract, "fxtract") FUNCTION(fprem, "fprem") FUNCTION(fprem1, "fprem1") FUNCTION(fsincos, "fsincos")
FUNCTION(fscale, "fscale")

/* Of ST(0) alone. */
#define FUNCTION_OF_ONE(helper, text, codes)                                                                                  \
    INSTRUCTION(do_##helper, text)                                                                                     \
    static void helper(uint8_t *env)                                                                                   \
    {                                                                                                                  \
        uint8_t result[16];                                                                                            \
        begin(env, CALLER);                                                                                            \
        if (quick_one(env, do_##helper, codes, NULL, result))                                                                 \
            memcpy(st(env, 0), result, 10);                                                                            \
        else                                                                                                           \
            whole(env, do_##helper, NULL);                                                                             \
    }
FUNCTION_OF_ONE(fchs_ST0, "fchs", STATUS_C1)
FUNCTION_OF_ONE(fabs_ST0, "fabs", STATUS_C1)
FUNCTION_OF_ONE(fxam_ST0, "fxam", STATUS_CODES)
FUNCTION_OF_ONE(fsqrt, "fsqrt", STATUS_C1)
FUNCTION_OF_ONE(frndint, "frndint", STATUS_C1)
FUNCTION_OF_ONE(f2xm1, "f2xm1", STATUS_C1)
FUNCTION_OF_ONE(fsin, "fsin", STATUS_C1 | STATUS_C2)
FUNCTION_OF_ONE(fcos, "fcos", STATUS_C1 | STATUS_C2)

/* ---- the table -------------------------------------------------------------------------------------------------- */

#define SAME(name) {"helper_" #name, (SlotFunction)name, NULL, NULL, 0}
#define ARITHMETIC_SLOTS(name) SAME(f##name##_ST0_FT0), SAME(f##name##_STN_ST0)

static const Slot x87_slots[] = {
    ARITHMETIC_SLOTS(add), ARITHMETIC_SLOTS(mul), ARITHMETIC_SLOTS(sub), ARITHMETIC_SLOTS(subr),
    ARITHMETIC_SLOTS(div), ARITHMETIC_SLOTS(divr),
    SAME(fcom_ST0_FT0), SAME(fucom_ST0_FT0), SAME(fcomi_ST0_FT0), SAME(fucomi_ST0_FT0),
    SAME(flds_FT0), SAME(fldl_FT0), SAME(fildl_FT0), SAME(fmov_FT0_STN), SAME(fldz_FT0),
    SAME(fchs_ST0), SAME(fabs_ST0), SAME(fxam_ST0), SAME(f2xm1), SAME(fyl2x), SAME(fyl2xp1), SAME(fptan),
    SAME(fpatan), SAME(fxtract), SAME(fprem), SAME(fprem1), SAME(fsqrt), SAME(fsincos), SAME(frndint),
    SAME(fscale), SAME(fsin), SAME(fcos),
};

size_t floats_x87_slots(const Slot **slots)
{
    *slots = x87_slots;
    return sizeof x87_slots / sizeof *x87_slots;
}
