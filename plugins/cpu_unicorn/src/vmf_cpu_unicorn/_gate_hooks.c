/* What the engine calls: exceptions, SYSCALL and SYSENTER, ports, CPUID, MMIO and the INTA cycle. See the top of _gate.c.
 *
 * Called without the GIL on the vCPU thread, from translated code. What may leave by longjmp (`engine_raise`, the
 * engine's own delivery and checks) must hold nothing of ours: no lock, no reference, not the GIL.
 */
#include "_gate.h"

/* ---- towards Python ------------------------------------------------------------------------------------------- */

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

int hooks_ask_pending(Gate *g)
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
    int asserted = hooks_ask_pending(g);
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

/* ---- hooks ---------------------------------------------------------------------------------------------------- */

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

static uint8_t code_byte(Gate *g, uint64_t offset)
{
    bool wide = ENV32(g, hflags) & HF_CS64;
    uint64_t base = wide ? 0 : *(uint64_t *)(g->env + g->c.segs + 24 * SEG_CS + 8);
    uint64_t address = base + ENV64(g, eip) + offset;
    return (uint8_t)((uint32_t (*)(void *, uint64_t))(uintptr_t)g->c.fn_ldub_code)(
        g->env, wide ? address : (uint32_t)address);
}

/* Length of INT1 at RIP with its prefixes, or 0: the engine does not know that instruction. */
static unsigned int1_length(Gate *g)
{
    for (unsigned n = 0; n < 15; n++) {
        uint8_t byte = code_byte(g, n);
        if (byte == 0xf1)
            return n + 1;
        bool rex = (byte & 0xf0) == 0x40 && (ENV32(g, hflags) & HF_CS64);
        if (!rex && (byte == 0 || memchr("\x66\x67\xf2\xf3\x2e\x36\x3e\x26\x64\x65", byte, 10) == NULL))
            return 0;
    }
    return 0;
}

static bool on_invalid_instruction(void *uc, void *user)
{
    Gate *g = user;
    unsigned length = int1_length(g);
    if (length) { /* SDM vol. 2, INT1: #DB behind the instruction, whatever the gate's privilege */
        ENV64(g, eip) += length;
        *(int32_t *)(uintptr_t)g->c.exception_index = VECTOR_DB;
        on_exception(uc, VECTOR_DB, user);
    } else {
        on_exception(uc, VECTOR_UD, user);
    }
    return true;
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

/* Length of the two-byte instruction (0F ..) at RIP with its prefixes: what the engine adds to RIP after the hook. */
static uint64_t two_byte_length(Gate *g)
{
    for (unsigned n = 0; n < 14; n++)
        if (code_byte(g, n) == 0x0f)
            return n + 2;
    return 2;
}

static void on_syscall(void *uc, void *user)
{
    /* AMD APM vol. 3, SYSCALL; outside 64-bit mode Intel's processors do not have it (SDM vol. 2). RIP is at the
     * instruction; the engine adds the instruction's length afterwards. */
    Gate *g = user;
    (void)uc;
    uint32_t hflags = ENV32(g, hflags);
    if (!(ENV64(g, efer) & 1) || !(g->c.amd || (hflags & HF_CS64)))
        engine_raise(g, VECTOR_UD, 0);
    uint64_t length = two_byte_length(g);
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

static void on_sysenter(void *uc, void *user)
{
    /* SDM vol. 2, SYSENTER; AMD's processors do not have it in long mode (APM vol. 3). The arithmetic flags are not
     * touched: the block that calls this writes its own view of them afterwards. */
    Gate *g = user;
    (void)uc;
    bool wide = ENV32(g, hflags) & HF_LMA;
    if (g->c.amd && wide)
        engine_raise(g, VECTOR_UD, 0);
    uint32_t selector = ENV32(g, sysenter_cs) & 0xfffc;
    if (!selector)
        engine_raise(g, VECTOR_GP, 0);
    uint64_t length = two_byte_length(g);
    ENV64(g, eflags) &= ~(uint64_t)(FLAG_VM | FLAG_IF | FLAG_RF);
    load_segment(g, SEG_CS, selector,
                 DESC_G | DESC_P | DESC_S | DESC_CODE | DESC_RW | DESC_A | (wide ? DESC_L : DESC_B));
    load_segment(g, SEG_SS, selector + 8, DESC_G | DESC_B | DESC_P | DESC_S | DESC_RW | DESC_A);
    engine_update_hflags(g);
    REG(g, RSP) = wide ? ENV64(g, sysenter_esp) : (uint32_t)ENV64(g, sysenter_esp);
    ENV64(g, eip) = (wide ? ENV64(g, sysenter_eip) : (uint32_t)ENV64(g, sysenter_eip)) - length;
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
    } else if (hooks_ask_pending(g) > 0) {
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

PyObject *hooks_addresses(Gate *g)
{
    return Py_BuildValue(
        "{sKsKsKsKsKsKsKsKsKsKsKsK}",
        "exception", (unsigned long long)(uintptr_t)on_exception,
        "invalid", (unsigned long long)(uintptr_t)on_invalid_instruction,
        "syscall", (unsigned long long)(uintptr_t)on_syscall,
        "sysenter", (unsigned long long)(uintptr_t)on_sysenter,
        "in", (unsigned long long)(uintptr_t)on_in,
        "out", (unsigned long long)(uintptr_t)on_out,
        "cpuid", (unsigned long long)(uintptr_t)on_cpuid,
        "mmio_read", (unsigned long long)(uintptr_t)on_mmio_read,
        "mmio_write", (unsigned long long)(uintptr_t)on_mmio_write,
        "vector_read", (unsigned long long)(uintptr_t)on_vector_read,
        "vector_write", (unsigned long long)(uintptr_t)on_vector_write,
        "user", (unsigned long long)(uintptr_t)g);
}
