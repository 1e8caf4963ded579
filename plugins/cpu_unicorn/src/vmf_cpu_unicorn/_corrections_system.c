/* MSRs, control registers and SYSEXIT: the engine's helpers accept what a processor refuses. See _corrections.c.
 *
 * The helpers here look at the operands, raise the processor's fault, and leave the work to the engine's own. An MSR
 * that the processor presented does not have is #GP, as everywhere; those that systems of this vendor use without asking
 * (KVM has them for that reason) read as 0 and take writes.
 */
#include "_corrections.h"

#include <x86intrin.h>

#define CR0_PE (1u << 0)
#define CR0_ET (1u << 4)
#define CR0_NW (1u << 29)
#define CR0_CD (1u << 30)
#define CR0_PG (1u << 31)
#define CR0_KEPT 0xe005003fu /* the others are not writable: SDM vol. 3A 2.5 */
#define CR4_PAE (1u << 5)
#define EFER_LME (1u << 8)
#define EFER_LMA (1u << 10)
#define HF_LMA (1u << 14)
#define HF_CS64 (1u << 15)
#define HF_CPL 3u

enum { RAX, RCX, RDX, RBX, RSP };

void (*engine_rdmsr)(uint8_t *), (*engine_wrmsr)(uint8_t *), (*engine_write_cr)(uint8_t *, int, uint64_t);
void (*engine_sysexit)(uint8_t *, int);

static inline uint64_t *registers(uint8_t *env)
{
    return (uint64_t *)(env + places.regs);
}

/* ---- MSRs ------------------------------------------------------------------------------------------------------- */

#define MSR_TSC 0x10
#define MSR_SYSENTER_ESP 0x175
#define MSR_SYSENTER_EIP 0x176
#define MSR_PAT 0x277
#define MSR_MTRR_DEFAULT 0x2ff
#define MSR_EFER 0xc0000080u
#define MSR_LSTAR 0xc0000082u
#define MSR_CSTAR 0xc0000083u
#define MSR_FS_BASE 0xc0000100u
#define MSR_GS_BASE 0xc0000101u
#define MSR_KERNEL_GS_BASE 0xc0000102u
#define MSR_TSC_AUX 0xc0000103u
#define MSR_HWCR 0xc0010015u
#define HWCR_TSC_FREQ_SEL (1u << 24) /* the TSC counts at the rate of P-state 0 */

typedef struct {
    uint32_t first, last;
} Range;

/* Held by the engine. */
static const Range held[] = {
    {0x1b, 0x1b},             /* APIC_BASE */
    {0x174, 0x176},           /* SYSENTER */
    {0x179, 0x17b},           /* MCG_CAP, _STATUS, _CTL */
    {0x1a0, 0x1a0},           /* MISC_ENABLE */
    {0x200, 0x20f}, {0x250, 0x250}, {0x258, 0x259}, {0x268, 0x26f}, {0x2ff, 0x2ff}, /* MTRRs */
    {0x277, 0x277},           /* PAT */
    {0xd90, 0xd90},           /* BNDCFGS */
    {0xc0000080u, 0xc0000084u}, {0xc0000100u, 0xc0000103u},
    {0xc0010117u, 0xc0010117u}, /* VM_HSAVE_PA */
};
/* Read as 0, writes are ignored: for processors of Intel's kind. */
static const Range idle_intel[] = {
    {0x17, 0x17}, {0x2a, 0x2a}, {0x79, 0x79}, {0x8b, 0x8b}, {0xcd, 0xcd}, {0x1d9, 0x1d9}, {0x1db, 0x1de},
    {0x198, 0x199}, {0x34, 0x34}, {0x1fc, 0x1fc},
};
/* The same for AMD's: PATCH_LEVEL, DEBUGCTL, SYSCFG, NB_CFG, INT_PENDING, TSEG, the configuration of core parts. */
static const Range idle_amd[] = {
    {0x8b, 0x8b}, {0x1d9, 0x1d9}, {0x1db, 0x1de}, {0xc0010010u, 0xc0010010u}, {0xc001001fu, 0xc0010020u},
    {0xc0010055u, 0xc0010055u}, {0xc0010058u, 0xc0010058u}, {0xc0010112u, 0xc0010114u}, {0xc0011020u, 0xc0011023u},
    {0xc0011029u, 0xc001102au},
};

#define IN(table, index) in_ranges(table, sizeof(table) / sizeof *(table), index)

static bool in_ranges(const Range *ranges, unsigned count, uint32_t index)
{
    for (unsigned n = 0; n < count; n++)
        if (ranges[n].first <= index && index <= ranges[n].last)
            return true;
    return false;
}

static inline bool is_idle(const Owner *owner, uint32_t index)
{
    return owner->amd ? IN(idle_amd, index) : IN(idle_intel, index);
}

/* Each byte is a memory type; PAT has one more than MTRRs (SDM vol. 3A 12.12.2). */
static bool are_types(uint64_t value, bool pat)
{
    for (unsigned n = 0; n < 8; n++, value >>= 8) {
        unsigned type = value & 0xff;
        if (type > 7 || type == 2 || type == 3 || (type == 7 && !pat))
            return false;
    }
    return true;
}

static bool mtrr_is_legal(const Owner *owner, uint32_t index, uint64_t value)
{
    uint64_t beyond = ~(uint64_t)0 << owner->address_bits;
    if (index == MSR_MTRR_DEFAULT)
        return !(value & ~(uint64_t)0xcff) && are_types(value & 0xff, false);
    if (index >= 0x250)
        return are_types(value, false);
    if (index & 1) /* mask: bit 11 makes it valid */
        return !(value & (beyond | 0x7ff));
    return !(value & (beyond | 0xf00)) && are_types(value & 0xff, false);
}

void corrected_rdmsr(uint8_t *env)
{
    const Owner *owner = owner_of(env);
    if (owner == NULL) {
        engine_rdmsr(env);
        return;
    }
    uint64_t *regs = registers(env), value = 0;
    uint32_t index = (uint32_t)regs[RCX];
    if (index == MSR_TSC)
        value = __rdtsc() + FIELD64(env, tsc_offset);
    else if (index == MSR_HWCR && owner->amd)
        value = HWCR_TSC_FREQ_SEL;
    else if (IN(held, index) || (index == 0xfe /* MTRRcap */) || (!owner->amd && index == 0x198 /* PERF_STATUS */)) {
        engine_rdmsr(env);
        return;
    } else if (!is_idle(owner, index))
        raise_fault(env, VECTOR_GP, __builtin_return_address(0));
    regs[RAX] = (uint32_t)value;
    regs[RDX] = value >> 32;
}

static bool msr_is_legal(const Owner *owner, uint8_t *env, uint32_t index, uint64_t value)
{
    switch (index) {
    case MSR_SYSENTER_ESP:
    case MSR_SYSENTER_EIP:
        return owner->amd || canonical(value);
    case MSR_LSTAR:
    case MSR_CSTAR:
    case MSR_FS_BASE:
    case MSR_GS_BASE:
    case MSR_KERNEL_GS_BASE:
        return canonical(value);
    case MSR_EFER:
        return !(value & ~(owner->efer | EFER_LMA)) &&
               (((value ^ FIELD64(env, efer)) & EFER_LME) == 0 || !(FIELD64(env, cr) & CR0_PG));
    case MSR_PAT:
        return are_types(value, true);
    case MSR_TSC_AUX:
        return !(value >> 32);
    }
    return !(index >= 0x200 && index <= 0x2ff) || mtrr_is_legal(owner, index, value);
}

void corrected_wrmsr(uint8_t *env)
{
    const Owner *owner = owner_of(env);
    if (owner == NULL) {
        engine_wrmsr(env);
        return;
    }
    uint64_t *regs = registers(env);
    uint32_t index = (uint32_t)regs[RCX];
    uint64_t value = (uint32_t)regs[RAX] | regs[RDX] << 32;
    if (index == MSR_TSC) {
        FIELD64(env, tsc_offset) = value - __rdtsc();
        return;
    }
    bool idle = is_idle(owner, index) || (index == MSR_HWCR && owner->amd);
    if (!(idle || IN(held, index)) || !msr_is_legal(owner, env, index, value))
        raise_fault(env, VECTOR_GP, __builtin_return_address(0));
    if (owner->amd && index == MSR_SYSENTER_ESP)
        FIELD64(env, sysenter_esp) = (uint32_t)value; /* AMD's processors have 32 bits of both */
    else if (owner->amd && index == MSR_SYSENTER_EIP)
        FIELD64(env, sysenter_eip) = (uint32_t)value;
    else if (!idle)
        engine_wrmsr(env);
}

/* ---- control registers ------------------------------------------------------------------------------------------ */

static bool cr0_is_legal(uint8_t *env, uint64_t value)
{
    bool paging = value & CR0_PG, wide = FIELD32(env, hflags) & HF_CS64;
    if (value >> 32 || (paging && !(value & CR0_PE)) || ((value & CR0_NW) && !(value & CR0_CD)))
        return false;
    if (paging == !!(FIELD64(env, cr) & CR0_PG))
        return true;
    if (!paging)
        return !wide; /* paging cannot be left in 64-bit mode */
    uint64_t cr4 = ((uint64_t *)(env + places.cr))[4];
    return !(FIELD64(env, efer) & EFER_LME) || (cr4 & CR4_PAE);
}

void corrected_write_cr(uint8_t *env, int number, uint64_t value)
{
    const Owner *owner = owner_of(env);
    bool legal = true;
    if (owner != NULL) {
        bool wide = FIELD32(env, hflags) & HF_LMA;
        switch (number) {
        case 0:
            legal = cr0_is_legal(env, value);
            value = (value & CR0_KEPT) | CR0_ET;
            break;
        case 3:
            legal = !wide || !(value >> owner->address_bits);
            break;
        case 4:
            legal = !(value & ~owner->cr4) && !(wide && !(value & CR4_PAE));
            break;
        case 8:
            legal = !(value >> 4);
        }
    }
    if (!legal)
        raise_fault(env, VECTOR_GP, __builtin_return_address(0));
    engine_write_cr(env, number, value);
}

/* ---- SYSEXIT ---------------------------------------------------------------------------------------------------- */

/* SDM vol. 2, SYSEXIT; AMD's processors do not have it in long mode. `size` is 2 with REX.W. */
void corrected_sysexit(uint8_t *env, int size)
{
    const Owner *owner = owner_of(env);
    if (owner != NULL) {
        void *back = __builtin_return_address(0);
        uint64_t *regs = registers(env);
        if (owner->amd && (FIELD32(env, hflags) & HF_LMA))
            raise_fault(env, 6, back);
        if (!(FIELD32(env, sysenter_cs) & 0xfffc) || (FIELD32(env, hflags) & HF_CPL))
            raise_fault(env, VECTOR_GP, back);
        if (size == 2) {
            if (!canonical(regs[RCX]) || !canonical(regs[RDX]))
                raise_fault(env, VECTOR_GP, back);
        } else {
            /* The engine copies all of RCX and RDX to RSP and RIP. */
            uint64_t rcx = regs[RCX], rdx = regs[RDX];
            regs[RCX] = (uint32_t)rcx;
            regs[RDX] = (uint32_t)rdx;
            engine_sysexit(env, size);
            regs[RCX] = rcx;
            regs[RDX] = rdx;
            return;
        }
    }
    engine_sysexit(env, size);
}
