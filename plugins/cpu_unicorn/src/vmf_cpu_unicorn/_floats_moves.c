/* x87: loads, stores, the stack and the control state. Theory: the top of _floats_x87.h. */
#include "_floats_x87.h"

/* ---- loads and stores ---------------------------------------------------------------------------------------------- */

static void load(uint8_t *env, Instruction instruction, void *memory)
{
    if (*tag(env, -1) && quick_begin(env)) {
        uint8_t result[16];
        instruction(memory);
        uint16_t status = quick_end(env);
        __asm__ volatile("fstpt %0" : "=m"(*(uint8_t(*)[10])result));
        if (accepted(env, status, STATUS_C1)) {
            memcpy(st(env, -1), result, 10);
            *tag(env, -1) = 0;
            AT32(env, fpstt) = physical(env, -1);
            return;
        }
    }
    whole(env, instruction, memory);
}

#define LOAD(name, text, type)                                                                                         \
    INSTRUCTION(do_##name, text)                                                                                       \
    static void name##_ST0(uint8_t *env, type value)                                                                   \
    {                                                                                                                  \
        begin(env, CALLER);                                                                                            \
        load(env, do_##name, &value);                                                                                  \
    }
LOAD(flds, "flds (%0)", uint32_t)
LOAD(fldl, "fldl (%0)", uint64_t)
LOAD(fildl, "fildl (%0)", int32_t)
LOAD(fildll, "fildll (%0)", int64_t)

INSTRUCTION(do_fldt, "fldt (%0)")
INSTRUCTION(do_fbld, "fbld (%0)")

static void load_bytes(uint8_t *env, uint64_t address, uint8_t *bytes, uintptr_t caller)
{
    uint64_t low = load_guest(floats_at.ldq, env, address, caller);
    uint16_t high = (uint16_t)load_guest(floats_at.lduw, env, address + 8, caller);
    memcpy(bytes, &low, 8);
    memcpy(bytes + 8, &high, 2);
}

static void store_bytes(uint8_t *env, uint64_t address, const uint8_t *bytes, uintptr_t caller)
{
    uint64_t low;
    uint16_t high;
    memcpy(&low, bytes, 8);
    memcpy(&high, bytes + 8, 2);
    store_guest(floats_at.stq, env, address, low, caller);
    store_guest(floats_at.stw, env, address + 8, high, caller);
}

static void load_ten(uint8_t *env, Instruction instruction, uint64_t address, uintptr_t caller)
{
    uint8_t bytes[16];
    begin(env, caller);
    load_bytes(env, address, bytes, caller);
    load(env, instruction, bytes);
}

static void fldt_ST0(uint8_t *env, uint64_t address)
{
    load_ten(env, do_fldt, address, CALLER);
}

static void fbld_ST0(uint8_t *env, uint64_t address)
{
    load_ten(env, do_fbld, address, CALLER);
}

/* `quickly` leaves the stack as it is, as far as `quick_one` can tell: FISTTP and others pop. */
#define STORE(name, helper, text, type, quickly)                                                                       \
    INSTRUCTION(do_##name, text)                                                                                       \
    static type helper(uint8_t *env)                                                                                   \
    {                                                                                                                  \
        uint64_t value = 0;                                                                                            \
        uint8_t result[16];                                                                                            \
        begin(env, CALLER);                                                                                            \
        if (!quickly || !quick_one(env, do_##name, STATUS_C1, &value, result))                                                    \
            whole_to_memory(env, do_##name, &value);                                                                   \
        return (type)value;                                                                                            \
    }
STORE(fsts, fsts_ST0, "fsts (%0)", uint32_t, true)
STORE(fstl, fstl_ST0, "fstl (%0)", uint64_t, true)
STORE(fists, fist_ST0, "fists (%0)", int16_t, true)
STORE(fistl, fistl_ST0, "fistl (%0)", int32_t, true)
STORE(fistpll, fistll_ST0, "fistpll (%0)", int64_t, false)
STORE(fisttps, fistt_ST0, "fisttps (%0)", int16_t, false)
STORE(fisttpl, fisttl_ST0, "fisttpl (%0)", int32_t, false)
STORE(fisttpll, fisttll_ST0, "fisttpll (%0)", int64_t, false)

INSTRUCTION(do_fstpt, "fstpt (%0)")
INSTRUCTION(do_fbstp, "fbstp (%0)")

/* Memory first: it may fault, and then nothing must have happened. */
static void store_ten(uint8_t *env, Instruction instruction, uint64_t address, uintptr_t caller)
{
    Area area;
    uint8_t bytes[10] = {0};
    begin(env, caller);
    uint16_t status = whole_status(env, &area, instruction, bytes);
    if (!(status & ~AT16(env, fpuc) & FLAG_IE))
        store_bytes(env, address, bytes, caller);
    take_status(env, status, FLAGS_BEFORE);
}

static void fstt_ST0(uint8_t *env, uint64_t address)
{
    store_ten(env, do_fstpt, address, CALLER);
}

static void fbst_ST0(uint8_t *env, uint64_t address)
{
    store_ten(env, do_fbstp, address, CALLER);
}

/* ---- the stack ------------------------------------------------------------------------------------------------------ */

/* An empty register was to be read (C1 clear), or a full one to be pushed onto (C1 set). Whether it is masked. */
static bool stack_fault(uint8_t *env, uint32_t c1)
{
    AT16(env, fpus) = (uint16_t)((AT16(env, fpus) & ~STATUS_C1) | FLAG_IE | STATUS_STACK | c1);
    summarize(env);
    return AT16(env, fpuc) & FLAG_IE;
}

static void push(uint8_t *env)
{
    AT32(env, fpstt) = physical(env, -1);
    *tag(env, 0) = 0;
}

/* FLD ST(i) and the constants push first and write then. */
static void fpush(uint8_t *env)
{
    begin(env, CALLER);
    Note note = PUSHED;
    if (*tag(env, -1))
        AT16(env, fpus) &= (uint16_t)~STATUS_C1;
    else
        note = stack_fault(env, STATUS_C1) ? PUSHED_NAN : NOT_PUSHED;
    if (note != NOT_PUSHED)
        push(env);
    operand_of(env)->note = (uint8_t)note;
}

/* Whether the value that was pushed is still to be written. */
static bool to_be_written(uint8_t *env)
{
    Note note = operand_of(env)->note;
    operand_of(env)->note = NO_NOTE;
    if (note == PUSHED_NAN)
        memcpy(st(env, 0), indefinite, 10);
    return note == PUSHED || note == NO_NOTE;
}

static void fpop(uint8_t *env)
{
    if (operand_of(env)->note == NOT_DONE)
        return;
    *tag(env, 0) = 1;
    AT32(env, fpstt) = physical(env, 1);
}

/* FLD ST(i), after the push; and FCMOVcc, whose condition the translator has looked at. */
static void fmov_ST0_STN(uint8_t *env, int number)
{
    Note note = operand_of(env)->note;
    if (note == NO_NOTE)
        wait_first(env, CALLER);
    /* Register 0 is the one that was pushed, the old ST(7): PUSHED says that it was empty. */
    bool missing = note != NO_NOTE && !number ? note == PUSHED : *tag(env, number);
    if (note == NO_NOTE)
        missing |= *tag(env, 0);
    else if (note == NOT_PUSHED)
        missing = *tag(env, number - 1);
    if (missing && (note == PUSHED_NAN || note == NOT_PUSHED))
        AT16(env, fpus) &= (uint16_t)~STATUS_C1; /* of both faults it shows the second */
    if (!to_be_written(env))
        return;
    if (!missing) {
        memmove(st(env, 0), st(env, number), 10);
    } else if (stack_fault(env, 0)) {
        memcpy(st(env, 0), indefinite, 10);
        *tag(env, 0) = 0;
    } else if (note == PUSHED) { /* that must not have happened */
        *tag(env, 0) = 1;
        AT32(env, fpstt) = physical(env, 1);
    }
}

/* FNCLEX: flags that stand in the host would be raised under a control word that does not mask them. */
#define CONSTANT(name)                                                                                                 \
    static void name##_ST0(uint8_t *env)                                                                               \
    {                                                                                                                  \
        if (to_be_written(env)) /* rounded as the control word says; no flags */                                       \
            __asm__ volatile("fnclex\n\tfldcw %1\n\t" #name "\n\tfstpt %0\n\tfninit"                                   \
                             : "=m"(*(uint8_t(*)[10])st(env, 0))                                                       \
                             : "m"(AT16(env, fpuc)));                                                                  \
    }
CONSTANT(fld1) CONSTANT(fldl2t) CONSTANT(fldl2e) CONSTANT(fldpi) CONSTANT(fldlg2) CONSTANT(fldln2) CONSTANT(fldz)

INSTRUCTION(do_fst, "fst %%st(1)")
INSTRUCTION(do_fxch, "fxch %%st(1)")

static void fmov_STN_ST0(uint8_t *env, int number)
{
    begin(env, CALLER);
    if (*tag(env, 0)) {
        pair(env, number, do_fst, NULL);
        return;
    }
    AT16(env, fpus) &= (uint16_t)~STATUS_C1;
    memmove(st(env, number), st(env, 0), 10);
    *tag(env, number) = 0;
}

static void fxchg_ST0_STN(uint8_t *env, int number)
{
    begin(env, CALLER);
    if (*tag(env, 0) || *tag(env, number)) {
        pair(env, number, do_fxch, NULL);
        return;
    }
    uint8_t kept[10];
    AT16(env, fpus) &= (uint16_t)~STATUS_C1;
    memcpy(kept, st(env, 0), 10);
    memmove(st(env, 0), st(env, number), 10);
    memcpy(st(env, number), kept, 10);
}

static void ffree_STN(uint8_t *env, int number)
{
    begin(env, CALLER);
    *tag(env, number) = 1;
    AT16(env, fpus) &= (uint16_t)~STATUS_C1;
}

static void turn(uint8_t *env, int by, uintptr_t caller)
{
    begin(env, caller);
    AT32(env, fpstt) = physical(env, by);
    AT16(env, fpus) &= (uint16_t)~STATUS_C1;
}

static void fincstp(uint8_t *env)
{
    turn(env, 1, CALLER);
}

static void fdecstp(uint8_t *env)
{
    turn(env, -1, CALLER);
}

/* ---- control state --------------------------------------------------------------------------------------------- */

static void set_control(uint8_t *env, uint64_t value)
{
    AT16(env, fpuc) = (uint16_t)((value & CONTROL_KEPT) | CONTROL_ALWAYS);
    summarize(env);
}

static void fldcw(uint8_t *env, uint32_t value)
{
    begin(env, CALLER);
    set_control(env, value);
}

/* FXRSTOR is the engine's, and keeps reserved bits. */
static uint32_t fnstcw(uint8_t *env)
{
    return (AT16(env, fpuc) & CONTROL_KEPT) | CONTROL_ALWAYS;
}

/* ES and B follow from the flags and their masks, whatever FXRSTOR has put there. */
static uint32_t fnstsw(uint8_t *env)
{
    summarize(env);
    return (AT16(env, fpus) & ~0x3800u) | (AT32(env, fpstt) & 7) << 11;
}

static void fwait(uint8_t *env)
{
    begin(env, CALLER);
}

/* ---- MMX, whose registers these are ---------------------------------------------------------------------------- */

void floats_enter_mmx(uint8_t *env, uintptr_t caller)
{
    begin(env, caller);
    AT32(env, fpstt) = 0;
    memset(env + floats_at.fptags, 0, 8);
}

static void enter_mmx(uint8_t *env)
{
    floats_enter_mmx(env, CALLER);
}

static void emms(uint8_t *env)
{
    floats_enter_mmx(env, CALLER);
    memset(env + floats_at.fptags, 1, 8);
}

/* The translator takes SSSE3's instructions for MMX registers for those of the vector registers in this respect. */
#define FOR_MMX(name)                                                                                                  \
    static SlotFunction engine_##name;                                                                                 \
    static void name(uint8_t *env, void *d, void *s, uint32_t immediate)                                               \
    {                                                                                                                  \
        floats_enter_mmx(env, CALLER);                                                                                 \
        ((void (*)(uint8_t *, void *, void *, uint32_t))engine_##name)(env, d, s, immediate);                          \
    }
FOR_MMX(pshufb_mmx) FOR_MMX(pabsb_mmx) FOR_MMX(pabsw_mmx) FOR_MMX(pabsd_mmx) FOR_MMX(pmaddubsw_mmx)
FOR_MMX(pmulhrsw_mmx) FOR_MMX(psignb_mmx) FOR_MMX(psignw_mmx) FOR_MMX(psignd_mmx) FOR_MMX(palignr_mmx)

/* ---- state in memory ------------------------------------------------------------------------------------------- */

/* The environment in memory, SDM vol. 1 figures 8-9 to 8-12: seven fields of 2 or of 4 bytes. */
enum { FIELDS = 7, FIELD_CONTROL = 0, FIELD_STATUS, FIELD_TAGS };

static inline uint64_t after_fields(uint64_t address, int wide)
{
    return address + (wide ? 4 * FIELDS : 2 * FIELDS);
}

static unsigned tag_word(uint8_t *env)
{
    unsigned tags = 0;
    for (int n = 7; n >= 0; n--) {
        const uint8_t *value = env + floats_at.fpregs + 16 * n;
        uint64_t mantissa;
        uint16_t exponent;
        memcpy(&mantissa, value, 8);
        memcpy(&exponent, value + 8, 2);
        exponent &= 0x7fff;
        unsigned kind = 0;
        if ((env + floats_at.fptags)[n])
            kind = 3;
        else if (!exponent && !mantissa)
            kind = 1;
        else if (!exponent || exponent == 0x7fff || !(mantissa >> 63))
            kind = 2;
        tags = tags << 2 | kind;
    }
    return tags;
}

static void store_environment(uint8_t *env, uint64_t address, int wide, uintptr_t caller)
{
    const uint64_t fields[FIELDS] = {fnstcw(env),      fnstsw(env),      tag_word(env),   AT64(env, fpip),
                                     AT16(env, fpcs),  AT64(env, fpdp),  AT16(env, fpds)};
    for (int n = 0; n < FIELDS; n++) {
        /* The reserved halves of the 32-bit form are ones. */
        bool half = n <= FIELD_TAGS || n == FIELDS - 1;
        uint64_t value = half && wide ? fields[n] | 0xffff0000 : fields[n];
        store_guest(wide ? floats_at.stl : floats_at.stw, env, address + (uint64_t)(n * (wide ? 4 : 2)), value, caller);
    }
}

static void load_environment(uint8_t *env, uint64_t address, int wide, uintptr_t caller)
{
    uint16_t fields[FIELDS];
    for (int n = 0; n < FIELDS; n++)
        fields[n] = (uint16_t)load_guest(floats_at.lduw, env, address + (uint64_t)(n * (wide ? 4 : 2)), caller);
    AT32(env, fpstt) = fields[FIELD_STATUS] >> 11 & 7;
    AT16(env, fpus) = fields[FIELD_STATUS] & (STATUS_STICKY | STATUS_CODES);
    for (int n = 0; n < 8; n++)
        (env + floats_at.fptags)[n] = (fields[FIELD_TAGS] >> 2 * n & 3) == 3;
    set_control(env, fields[FIELD_CONTROL]);
}

static void fstenv(uint8_t *env, uint64_t address, int wide)
{
    store_environment(env, address, wide, CALLER);
    set_control(env, AT16(env, fpuc) | FLAGS);
}

static void fldenv(uint8_t *env, uint64_t address, int wide)
{
    uintptr_t caller = CALLER;
    begin(env, caller);
    load_environment(env, address, wide, caller);
}

static void fsave(uint8_t *env, uint64_t address, int wide)
{
    uintptr_t caller = CALLER;
    uint64_t registers = after_fields(address, wide);
    store_environment(env, address, wide, caller);
    for (int n = 0; n < 8; n++)
        store_bytes(env, registers + 10 * (uint64_t)n, st(env, n), caller);
    AT32(env, fpstt) = 0;
    AT16(env, fpus) = AT16(env, fpcs) = AT16(env, fpds) = 0;
    AT64(env, fpip) = AT64(env, fpdp) = 0;
    memset(env + floats_at.fptags, 1, 8);
    set_control(env, CONTROL_USUAL);
}

/* Everything is read before anything is changed: a read may fault. */
static void frstor(uint8_t *env, uint64_t address, int wide)
{
    uintptr_t caller = CALLER;
    uint64_t from = after_fields(address, wide);
    uint8_t registers[8][16];
    begin(env, caller);
    for (int n = 0; n < 8; n++)
        load_bytes(env, from + 10 * (uint64_t)n, registers[n], caller);
    load_environment(env, address, wide, caller);
    for (int n = 0; n < 8; n++)
        memcpy(st(env, n), registers[n], 10);
}

/* ---- the table -------------------------------------------------------------------------------------------------- */

#define SAME(name) {"helper_" #name, (SlotFunction)name, NULL, NULL, 0}
#define AROUND(name) {"helper_" #name, (SlotFunction)name, &engine_##name, NULL, 0}

static const Slot moves_slots[] = {
    SAME(flds_ST0), SAME(fldl_ST0), SAME(fildl_ST0), SAME(fildll_ST0), SAME(fldt_ST0), SAME(fbld_ST0),
    SAME(fsts_ST0), SAME(fstl_ST0), SAME(fist_ST0), SAME(fistl_ST0), SAME(fistll_ST0),
    SAME(fistt_ST0), SAME(fisttl_ST0), SAME(fisttll_ST0), SAME(fstt_ST0), SAME(fbst_ST0),
    SAME(fpush), SAME(fpop), SAME(fmov_ST0_STN), SAME(fmov_STN_ST0), SAME(fxchg_ST0_STN), SAME(ffree_STN),
    SAME(fincstp), SAME(fdecstp),
    SAME(fld1_ST0), SAME(fldl2t_ST0), SAME(fldl2e_ST0), SAME(fldpi_ST0), SAME(fldlg2_ST0), SAME(fldln2_ST0),
    SAME(fldz_ST0),
    SAME(fldcw), SAME(fnstcw), SAME(fnstsw), SAME(fwait), SAME(fstenv), SAME(fldenv), SAME(fsave), SAME(frstor),
    SAME(enter_mmx), SAME(emms),
    AROUND(pshufb_mmx), AROUND(pabsb_mmx), AROUND(pabsw_mmx), AROUND(pabsd_mmx), AROUND(pmaddubsw_mmx),
    AROUND(pmulhrsw_mmx), AROUND(psignb_mmx), AROUND(psignw_mmx), AROUND(psignd_mmx), AROUND(palignr_mmx),
};

size_t floats_moves_slots(const Slot **slots)
{
    *slots = moves_slots;
    return sizeof moves_slots / sizeof *moves_slots;
}
