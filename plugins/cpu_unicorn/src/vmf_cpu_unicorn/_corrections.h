/* What the rooms of the corrections share. Their theory: the top of _corrections.c. */
#ifndef VMF_CORRECTIONS_H
#define VMF_CORRECTIONS_H

#include <stdbool.h>
#include <stdint.h>

/* Filled by corrections.py in this very order: places in the engine's structures, functions, bits. 8 bytes each. */
typedef struct {
    uint64_t env_ptr, cpu_class, uc;                      /* offsets in CPUState */
    uint64_t tcg_context;                                 /* offset in uc_struct */
    uint64_t ops;                                         /* offset in TCGContext: the head of the list of operations */
    uint64_t regs, segs, hflags, cr, efer;                /* offsets in env */
    uint64_t sysenter_cs, sysenter_esp, sysenter_eip, tsc_offset;
    uint64_t raise_exception, do_interrupt, start_function, insert_before; /* functions */
} Places;

/* One engine that is served. Touched by its vCPU thread alone while it runs. */
typedef struct {
    uint8_t *env;
    uint64_t cr4;          /* bits of CR4 that the contract has */
    uint64_t efer;         /* of EFER */
    uint64_t address_bits; /* of a guest-physical address */
    bool amd;
} Owner;

extern Places places;

/* The engine with this env, or NULL. */
const Owner *owner_of(const uint8_t *env);

#define FIELD64(env, field) (*(uint64_t *)((env) + places.field))
#define FIELD32(env, field) (*(uint32_t *)((env) + places.field))

#define VECTOR_GP 13

/* Raises an exception without an error code, or with 0; leaves by longjmp. `back` is the return address into translated code. */
static inline void raise_fault(uint8_t *env, int vector, void *back)
{
    ((void (*)(uint8_t *, int, int, uintptr_t))(uintptr_t)places.raise_exception)(env, vector, 0, (uintptr_t)back);
    __builtin_unreachable();
}

static inline bool canonical(uint64_t address)
{
    return (uint64_t)((int64_t)(address << 16) >> 16) == address;
}

/* ---- _corrections_system.c: in place of helpers ------------------------------------------------------------------ */

extern void (*engine_rdmsr)(uint8_t *), (*engine_wrmsr)(uint8_t *), (*engine_write_cr)(uint8_t *, int, uint64_t);
extern void (*engine_sysexit)(uint8_t *, int);
void corrected_rdmsr(uint8_t *env);
void corrected_wrmsr(uint8_t *env);
void corrected_write_cr(uint8_t *env, int number, uint64_t value);
void corrected_sysexit(uint8_t *env, int size);

/* ---- _corrections_code.c: around the translator ------------------------------------------------------------------ */

extern void (*engine_translate)(uint8_t *, uint8_t *, int);
extern uint32_t (*engine_load_byte)(uint8_t *, uint64_t);
void corrected_translate(uint8_t *cpu, uint8_t *block, int most);
uint32_t corrected_load_byte(uint8_t *env, uint64_t address);
void corrected_unaligned(uint8_t *cpu, uint64_t address, int access, int mode, uintptr_t back);

#endif
