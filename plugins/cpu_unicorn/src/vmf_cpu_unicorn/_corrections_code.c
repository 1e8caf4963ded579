/* Around the translator: encodings that it takes for something else, and operations that it gets wrong.
 *
 * Theory of operation
 * -------------------
 * The engine calls `corrected_translate` for each block. It lets the engine translate, and then goes through the list of
 * operations that came out, instruction by instruction, before machine code is made of it. What the engine read of each
 * instruction byte by byte (prefixes, opcode, ModRM) was written down by `corrected_load_byte`. So nothing is fetched
 * twice, and translated code does not get slower.
 *
 *  - An encoding that a processor refuses with #UD: the block is translated anew, up to there. When it begins with such
 *    an instruction, the engine is shown UD2 in its place. The block keeps the instruction's own size, so that a change
 *    of its bytes drops it.
 *  - CMPXCHG with 32-bit operands: the engine writes EAX and the destination whatever the comparison says, and so clears
 *    the upper half of a register that the processor leaves alone. The operation that writes it becomes a conditional
 *    move.
 *  - A 16-byte operand in memory of an SSE instruction must be aligned, but for a few: the first of the two accesses gets
 *    that demand. The engine's fast path then compares more bits at no cost; its slow path calls
 *    `corrected_unaligned`: #GP.
 */
#include "_corrections.h"

#include <stddef.h>
#include <string.h>

void (*engine_translate)(uint8_t *, uint8_t *, int);
uint32_t (*engine_load_byte)(uint8_t *, uint64_t);

#define HF_CS32 (1u << 4)
#define HF_CS64 (1u << 15)

/* TranslationBlock: pc, flags, size. */
#define BLOCK_PC 0
#define BLOCK_FLAGS 16
#define BLOCK_SIZE 20

/* Numbers of operations, of tcg-opc.h in the engine's source. */
enum { OP_MOV = 63, OP_MOVCOND = 66, OP_EXT32U = 109, OP_INSN_START = 129, OP_LOAD = 135, OP_STORE = 136 };
#define CONDITION_EQUAL 8
/* An access's description: MMU mode in bits 0-3, above it the size (2 bits) and, from bit 8, the alignment. */
#define ACCESS_SIZE(oi) ((oi) >> 4 & 3)
#define ACCESS_8_BYTES 3
#define ACCESS_ALIGN_16 (4u << 8)
#define ACCESS_ALIGNMENT (7u << 8)

typedef struct Operation {
    uint64_t kind; /* number in the low byte */
    struct Operation *next, **back;
    uint64_t arguments[11];
} Operation;

typedef struct {
    uint8_t kinds[8];
    uint64_t value;
    void *base;
    int64_t offset;
    const char *name;
} Temporary;

/* The bytes of a block: never more than a page and an instruction. */
#define MOST_BYTES (4096 + 16)

static __thread struct {
    bool active, forged;
    uint64_t start;
    uint8_t bytes[MOST_BYTES];
} fetch;

uint32_t corrected_load_byte(uint8_t *env, uint64_t address)
{
    uint32_t value = engine_load_byte(env, address);
    uint64_t offset = address - fetch.start;
    if (!fetch.active || offset >= MOST_BYTES)
        return value;
    if (fetch.forged && offset < 2)
        return offset ? 0x0b : 0x0f; /* UD2 */
    fetch.bytes[offset] = (uint8_t)value;
    return value;
}

/* ---- what an instruction is ------------------------------------------------------------------------------------- */

typedef enum { PLAIN, UNDEFINED, CMPXCHG32, CMPXCHG32_REGISTER, ALIGNED } Class;

typedef struct {
    bool lock, data, rep, repne;
    uint8_t rex, map, opcode, modrm; /* map: 0, 1 (0F), 2 (0F 38), 3 (0F 3A) */
} Instruction;

/* False when it is not all there: the engine refused it before. */
static bool decode(Instruction *i, const uint8_t *bytes, unsigned size, bool wide)
{
    unsigned n = 0;
    memset(i, 0, sizeof *i);
    for (; n < size; n++) {
        uint8_t byte = bytes[n];
        if (byte == 0xf0)
            i->lock = true;
        else if (byte == 0x66)
            i->data = true;
        else if (byte == 0xf3)
            i->rep = true;
        else if (byte == 0xf2)
            i->repne = true;
        else if (wide && (byte & 0xf0) == 0x40) {
            i->rex = byte;
            continue;
        } else if (byte != 0x67 && byte != 0x64 && byte != 0x65 && byte != 0x2e && byte != 0x36 && byte != 0x3e &&
                   byte != 0x26)
            break;
        i->rex = 0; /* counts only next to the opcode */
    }
    if (n >= size)
        return false;
    i->opcode = bytes[n++];
    if (i->opcode == 0x0f && n < size) {
        i->map = 1;
        i->opcode = bytes[n++];
        if ((i->opcode == 0x38 || i->opcode == 0x3a) && n < size) {
            i->map = i->opcode == 0x38 ? 2 : 3;
            i->opcode = bytes[n++];
        }
    }
    i->modrm = n < size ? bytes[n] : 0;
    return true;
}

/* SDM vol. 2, LOCK: these, with a destination in memory. */
static bool takes_lock(const Instruction *i)
{
    unsigned extension = i->modrm >> 3 & 7, op = i->opcode;
    if (i->modrm >> 6 == 3)
        return false;
    if (i->map == 0) {
        if (op < 0x38)
            return (op & 7) < 2; /* ADD OR ADC SBB AND SUB XOR */
        if (op >= 0x80 && op <= 0x83)
            return extension != 7;
        return op == 0x86 || op == 0x87 || ((op == 0xf6 || op == 0xf7) && (extension == 2 || extension == 3)) ||
               ((op == 0xfe || op == 0xff) && extension < 2);
    }
    return i->map == 1 && (op == 0xab || op == 0xb3 || op == 0xbb || op == 0xb0 || op == 0xb1 || op == 0xc0 ||
                           op == 0xc1 || (op == 0xba && extension > 4) || (op == 0xc7 && extension == 1));
}

static bool is_undefined(const Instruction *i)
{
    unsigned extension = i->modrm >> 3 & 7, op = i->opcode;
    bool memory = i->modrm >> 6 != 3, prefixed = i->data || i->rep || i->repne;
    if (i->lock && !takes_lock(i))
        return true;
    switch (i->map) {
    case 0:
        return (op == 0x8f || op == 0xc6 || op == 0xc7) && extension; /* POP and MOV: one row of their groups only */
    case 1:
        return (memory && (op == 0x50 || op == 0xf7)) ||               /* MOVMSKPS, MASKMOVQ: registers only */
               (memory && op >= 0x71 && op <= 0x73) ||                 /* shifts by an immediate: registers only */
               (op == 0xc3 && prefixed) ||                             /* MOVNTI */
               (op == 0xd6 && memory && (i->rep || i->repne)) ||       /* MOVQ2DQ, MOVDQ2Q */
               ((op == 0x78 || op == 0x79) && (i->data || i->repne));  /* EXTRQ, INSERTQ: SSE4a, which no contract has */
    case 2:
        return (op == 0xf0 || op == 0xf1) && !i->repne && !memory; /* MOVBE */
    }
    return false;
}

/* Whether an operand in memory that the engine reads as 16 bytes may lie anywhere: MOVUPS, MOVUPD, MOVDQU, LDDQU and
 * PCMPxSTRx; operands that are smaller in truth; and what is no SSE. */
static bool may_be_unaligned(const Instruction *i)
{
    unsigned op = i->opcode;
    bool single = !i->data && !i->rep && !i->repne;
    if (i->map == 1)
        return op == 0x10 || op == 0x11 || ((op == 0x6f || op == 0x7f) && i->rep) || (op == 0xf0 && i->repne) ||
               (single && (op == 0x2c || op == 0x2d || op == 0x5a)) || (op == 0xe6 && i->rep) || op < 0x10 ||
               op == 0x1a || op == 0x1b || (op >= 0x80 && op < 0xc2) || (op >= 0xc7 && op < 0xd0);
    return i->map == 0 || (i->map == 3 && ((op >= 0x60 && op <= 0x63) || op == 0x0a || op == 0x0b));
}

static Class classify(const uint8_t *bytes, unsigned size, uint32_t flags)
{
    Instruction i;
    bool wide = flags & HF_CS64;
    if (!decode(&i, bytes, size, wide))
        return PLAIN;
    if (is_undefined(&i))
        return UNDEFINED;
    if (wide && i.map == 1 && i.opcode == 0xb1 && !(i.rex & 8) && !i.data)
        return i.modrm >> 6 == 3 ? CMPXCHG32_REGISTER : CMPXCHG32;
    return i.map && i.modrm >> 6 != 3 && !may_be_unaligned(&i) ? ALIGNED : PLAIN;
}

/* ---- changing operations ---------------------------------------------------------------------------------------- */

static inline bool is_rax(uint64_t argument)
{
    const Temporary *t = (const Temporary *)(uintptr_t)argument;
    return t->name != NULL && !strcmp(t->name, "rax");
}

/* Where we are within one instruction. */
typedef struct {
    Class class;
    unsigned moves;
    uint64_t old, compared; /* CMPXCHG: what was there, what it was compared with */
    bool accumulator_done;
    Operation *load, *store; /* the first 8-byte accesses */
} Progress;

static void make_conditional(Operation *op, Progress *p, uint64_t taken, uint64_t otherwise)
{
    op->kind = (op->kind & ~(uint64_t)0xff) | OP_MOVCOND;
    op->arguments[1] = p->old;
    op->arguments[2] = p->compared;
    op->arguments[3] = taken;
    op->arguments[4] = otherwise;
    op->arguments[5] = CONDITION_EQUAL;
}

/* CMPXCHG r/m32, r32 comes out as: new = source; compared = RAX; old = destination, zero-extended; ...; RAX = the low
 * half of old; for a register destination: destination = the low half of new. */
static void correct_cmpxchg(void *context, Operation *op, Progress *p)
{
    unsigned kind = op->kind & 0xff;
    if (kind == OP_MOV && ++p->moves == 2 && is_rax(op->arguments[1])) {
        op->kind = (op->kind & ~(uint64_t)0xff) | OP_EXT32U;
        p->compared = op->arguments[0];
        return;
    }
    if (kind != OP_EXT32U || !p->compared)
        return;
    if (!p->accumulator_done) {
        if (!is_rax(op->arguments[0]))
            return;
        p->accumulator_done = true;
        p->old = op->arguments[1];
        make_conditional(op, p, op->arguments[0], p->old);
    } else if (p->class == CMPXCHG32_REGISTER) {
        uint64_t fresh = op->arguments[1];
        Operation *extend = ((Operation * (*)(void *, Operation *, int))(uintptr_t)places.insert_before)(
            context, op, OP_EXT32U);
        extend->arguments[0] = extend->arguments[1] = fresh;
        make_conditional(op, p, fresh, op->arguments[0]);
        p->class = PLAIN;
    }
}

static void correct_alignment(Operation *op, Progress *p)
{
    unsigned kind = op->kind & 0xff;
    if ((kind != OP_LOAD && kind != OP_STORE) || ACCESS_SIZE(op->arguments[2]) != ACCESS_8_BYTES)
        return;
    Operation **first = kind == OP_LOAD ? &p->load : &p->store;
    if (*first == NULL)
        *first = op;
    else if (!((*first)->arguments[2] & ACCESS_ALIGNMENT))
        (*first)->arguments[2] |= ACCESS_ALIGN_16;
}

/* Go through a block. The index of the first instruction that is undefined, or -1. */
static int correct(void *context, const uint8_t *block, unsigned *size)
{
    uint64_t start = *(const uint64_t *)(block + BLOCK_PC);
    uint32_t flags = *(const uint32_t *)(block + BLOCK_FLAGS);
    uint64_t end = start + *(const uint16_t *)(block + BLOCK_SIZE);
    Progress progress = {0};
    int index = -1;
    for (Operation *op = *(Operation **)((uint8_t *)context + places.ops), *next; op != NULL; op = next) {
        next = op->next;
        if ((op->kind & 0xff) == OP_INSN_START) {
            index++;
            uint64_t after = end, pc = op->arguments[0];
            for (Operation *later = next; later != NULL; later = later->next)
                if ((later->kind & 0xff) == OP_INSN_START) {
                    after = later->arguments[0];
                    break;
                }
            progress = (Progress){0};
            if (pc - start < MOST_BYTES - 16 && after - pc <= 16)
                progress.class = classify(fetch.bytes + (pc - start), (unsigned)(after - pc), flags);
            if (progress.class == UNDEFINED) {
                *size = (unsigned)(after - pc);
                return index;
            }
        } else if (progress.class == ALIGNED) {
            correct_alignment(op, &progress);
        } else if (progress.class == CMPXCHG32 || progress.class == CMPXCHG32_REGISTER) {
            correct_cmpxchg(context, op, &progress);
        }
    }
    return -1;
}

void corrected_translate(uint8_t *cpu, uint8_t *block, int most)
{
    const Owner *owner = owner_of(*(uint8_t **)(cpu + places.env_ptr));
    fetch.active = fetch.forged = false;
    if (owner == NULL) {
        engine_translate(cpu, block, most);
        return;
    }
    uint8_t *uc = *(uint8_t **)(cpu + places.uc);
    void *context = *(void **)(uc + places.tcg_context);
    fetch.start = *(const uint64_t *)(block + BLOCK_PC);
    fetch.active = true;
    engine_translate(cpu, block, most); /* may leave by longjmp: the next one begins afresh */
    unsigned size = 0;
    int undefined = correct(context, block, &size);
    if (undefined >= 0) {
        ((void (*)(void *))(uintptr_t)places.start_function)(context);
        fetch.forged = undefined == 0;
        engine_translate(cpu, block, undefined ? undefined : 1);
        if (undefined)
            correct(context, block, &size);
        else
            *(uint16_t *)(block + BLOCK_SIZE) = (uint16_t)size;
    }
    fetch.active = fetch.forged = false;
}

void corrected_unaligned(uint8_t *cpu, uint64_t address, int access, int mode, uintptr_t back)
{
    (void)address, (void)access, (void)mode;
    raise_fault(*(uint8_t **)(cpu + places.env_ptr), VECTOR_GP, (void *)back);
}
