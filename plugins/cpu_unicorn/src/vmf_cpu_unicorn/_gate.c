/* The native gate: what must happen between the engine and vmf without Python frames in between.
 *
 * Theory of operation
 * -------------------
 * Unicorn stops short of three things that a whole machine needs; the gate adds them, driving the engine's own
 * exported functions (their addresses, and the offsets of the fields used, come calibrated from layout.py):
 *
 *  - Exceptions. Unicorn reports them to a hook instead of delivering them. The hook here calls the engine's own
 *    delivery, which may fault again (stack not present, bad gate) and then leaves by longjmp to the engine's loop,
 *    over our frame. That is why it is C: a longjmp over a Python frame is a crash.
 *  - SYSCALL and SYSENTER, which the engine leaves undefined.
 *  - Port access rights (CPL against IOPL and the TSS bitmap), which the engine does not check.
 *
 * Interrupts use the engine's virtual-interrupt request: its bit is set while the controller asserts INTR, and the
 * engine looks at it whenever IF may have opened. At the moment of delivery it fetches the vector from guest-physical
 * memory at vm_vmcb+0x64. That page is MMIO of ours, so its read callback *is* the INTA cycle: an interrupt is
 * acknowledged only when it is really being delivered, and nothing is ever in flight between two slices.
 * The same callback, reached with IF forced open, injects an exception that a restored state brought along.
 *
 * Stopping is the pacer's (_gate_pacer.c). Python sets the engine's no_exit_request, so that stops are noticed at block
 * starts only.
 *
 * GIL: released around the engine, taken back for each callback into Python (_gate_hooks.c).
 */
#include "_gate.h"

/* ---- running -------------------------------------------------------------------------------------------------- */

static PyObject *gate_run(PyObject *self, PyObject *argument)
{
    Gate *g = (Gate *)self;
    int64_t deadline = INT64_MAX;
    if (argument != Py_None) {
        deadline = PyLong_AsLongLong(argument);
        if (deadline == -1 && PyErr_Occurred())
            return NULL;
    }
    if (!g->pacer_runs) {
        PyErr_SetString(PyExc_RuntimeError, "the vCPU is closed");
        return NULL;
    }
    volatile uint32_t *halted = (uint32_t *)(uintptr_t)g->c.halted;
    g->engine_error = 0;
    for (;;) {
        if (atomic_exchange(&g->kicked, false))
            return PyLong_FromLong(EXIT_KICKED);
        int asserted = hooks_ask_pending(g);
        if (asserted < 0)
            return PyLong_FromLong(EXIT_ERROR);
        bool deliver = asserted || g->inflight >= 0;
        if (g->halted) {
            bool nmi = g->nmi_pending && !(ENV32(g, hflags2) & HF2_NMI_MASKED);
            bool wakes = nmi || g->exception >= 0 || (deliver && (ENV64(g, eflags) & FLAG_IF));
            if (!wakes)
                return PyLong_FromLong(EXIT_HALTED);
            g->halted = false;
        }
        uint32_t request = REQUEST(g) & ~REQUEST_VIRQ;
        if (g->nmi_pending)
            request |= REQUEST_NMI;
        g->nmi_pending = false;
        if (deliver)
            request |= REQUEST_VIRQ;
        if (g->exception >= 0) { /* see on_vector_read */
            g->saved_if = (uint32_t)ENV64(g, eflags) & FLAG_IF;
            g->saved_inhibit = ENV32(g, hflags) & HF_INHIBIT_IRQ;
            ENV64(g, eflags) |= FLAG_IF;
            ENV32(g, hflags) &= ~HF_INHIBIT_IRQ;
            g->request_after = request; /* the exception comes first */
            request = REQUEST_VIRQ;
        }
        REQUEST(g) = request;
        ENV64(g, vm_vmcb) = g->c.vector_page;
        *halted = 0;

        pacer_begin_slice(g, deadline);
        python_leave(g);
        int code = ((int (*)(void *, uint64_t, uint64_t, uint64_t, size_t))(uintptr_t)g->c.fn_emu_start)(
            (void *)(uintptr_t)g->c.uc, ENV64(g, eip), 0, 0, 0);
        pacer_end_slice(g);
        python_enter(g);

        if (REQUEST(g) & REQUEST_NMI) {
            REQUEST(g) &= ~REQUEST_NMI;
            g->nmi_pending = true;
        }
        if (g->error != NULL)
            return PyLong_FromLong(EXIT_ERROR);
        if (code != 0) {
            g->engine_error = code;
            return PyLong_FromLong(EXIT_ERROR);
        }
        if (PyErr_CheckSignals() < 0)
            return NULL;
        if (*halted) {
            g->halted = true;
        } else if ((int32_t)ENV32(g, old_exception) == VECTOR_DF) {
            return PyLong_FromLong(EXIT_SHUTDOWN); /* a double fault that could not be delivered */
        }
        if (!g->halted && now_ns() >= deadline) {
            atomic_store(&g->kicked, false);
            return PyLong_FromLong(EXIT_KICKED);
        }
    }
}

static PyObject *gate_kick(PyObject *self, PyObject *unused)
{
    (void)unused;
    pacer_kick((Gate *)self);
    Py_RETURN_NONE;
}

/* ---- the object ----------------------------------------------------------------------------------------------- */

static PyObject *gate_take_error(PyObject *self, PyObject *unused)
{
    Gate *g = (Gate *)self;
    (void)unused;
    PyObject *error = g->error != NULL ? g->error : Py_NewRef(Py_None);
    g->error = NULL;
    return Py_BuildValue("(Ni)", error, g->engine_error);
}

static PyObject *gate_hooks(PyObject *self, PyObject *unused)
{
    (void)unused;
    return hooks_addresses((Gate *)self);
}

static PyObject *gate_mmio_window(PyObject *self, PyObject *argument)
{
    Gate *g = (Gate *)self;
    uint64_t base = PyLong_AsUnsignedLongLong(argument);
    if (PyErr_Occurred())
        return NULL;
    MmioWindow *window = malloc(sizeof *window);
    if (window == NULL)
        return PyErr_NoMemory();
    *window = (MmioWindow){g, base, g->windows};
    g->windows = window;
    return PyLong_FromUnsignedLongLong((uintptr_t)window);
}

/* (halted, inflight vector or -1, exception or -1, its code, NMI pending): what lies outside the engine. */
static PyObject *gate_get_events(PyObject *self, PyObject *unused)
{
    Gate *g = (Gate *)self;
    (void)unused;
    return Py_BuildValue("(NiiIN)", PyBool_FromLong(g->halted), g->inflight, g->exception, g->exception_code,
                         PyBool_FromLong(g->nmi_pending));
}

static PyObject *gate_set_events(PyObject *self, PyObject *arguments)
{
    Gate *g = (Gate *)self;
    int halted, inflight, exception, nmi;
    unsigned int code;
    if (!PyArg_ParseTuple(arguments, "piiIp", &halted, &inflight, &exception, &code, &nmi))
        return NULL;
    g->halted = halted;
    g->inflight = inflight;
    g->exception = exception;
    g->exception_code = code;
    g->nmi_pending = nmi;
    REQUEST(g) = 0;
    Py_RETURN_NONE;
}

static PyObject *gate_close(PyObject *self, PyObject *unused)
{
    (void)unused;
    pacer_stop((Gate *)self);
    Py_RETURN_NONE;
}

static PyObject *gate_new(PyTypeObject *type, PyObject *arguments, PyObject *keywords)
{
    const char *config;
    const char *rows;
    Py_ssize_t config_size, rows_size;
    int osxsave;
    PyObject *handlers[6];
    (void)keywords;
    if (!PyArg_ParseTuple(arguments, "y#y#pOOOOOO", &config, &config_size, &rows, &rows_size, &osxsave, &handlers[0],
                          &handlers[1], &handlers[2], &handlers[3], &handlers[4], &handlers[5]))
        return NULL;
    if (config_size != sizeof(Config) || rows_size % sizeof(CpuidRow)) {
        PyErr_SetString(PyExc_ValueError, "configuration of another version");
        return NULL;
    }
    Gate *g = (Gate *)type->tp_alloc(type, 0);
    if (g == NULL)
        return NULL;
    memcpy(&g->c, config, sizeof g->c);
    g->env = (uint8_t *)(uintptr_t)g->c.env;
    g->port_read = Py_NewRef(handlers[0]);
    g->port_write = Py_NewRef(handlers[1]);
    g->mmio_read = Py_NewRef(handlers[2]);
    g->mmio_write = Py_NewRef(handlers[3]);
    g->pending = Py_NewRef(handlers[4]);
    g->acknowledge = Py_NewRef(handlers[5]);
    g->cpuid_osxsave = osxsave;
    g->inflight = g->exception = -1;
    g->cpuid_rows = rows_size / (Py_ssize_t)sizeof(CpuidRow);
    g->cpuid = malloc(rows_size ? (size_t)rows_size : 1);
    if (g->cpuid == NULL) {
        Py_DECREF(g);
        return PyErr_NoMemory();
    }
    memcpy(g->cpuid, rows, (size_t)rows_size);
    if (!pacer_start(g)) {
        Py_DECREF(g);
        PyErr_SetString(PyExc_OSError, "cannot start the pacer thread");
        return NULL;
    }
    return (PyObject *)g;
}

static int gate_traverse(PyObject *self, visitproc visit, void *arg)
{
    Gate *g = (Gate *)self;
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(g->port_read);
    Py_VISIT(g->port_write);
    Py_VISIT(g->mmio_read);
    Py_VISIT(g->mmio_write);
    Py_VISIT(g->pending);
    Py_VISIT(g->acknowledge);
    Py_VISIT(g->error);
    return 0;
}

static int gate_clear(PyObject *self)
{
    Gate *g = (Gate *)self;
    Py_CLEAR(g->port_read);
    Py_CLEAR(g->port_write);
    Py_CLEAR(g->mmio_read);
    Py_CLEAR(g->mmio_write);
    Py_CLEAR(g->pending);
    Py_CLEAR(g->acknowledge);
    Py_CLEAR(g->error);
    return 0;
}

static void gate_dealloc(PyObject *self)
{
    Gate *g = (Gate *)self;
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    pacer_stop(g);
    gate_clear(self);
    free(g->cpuid);
    while (g->windows != NULL) {
        MmioWindow *next = g->windows->next;
        free(g->windows);
        g->windows = next;
    }
    type->tp_free(self);
    Py_DECREF(type);
}

static PyMethodDef gate_methods[] = {
    {"run", gate_run, METH_O, "run(deadline_ns | None) -> exit code"},
    {"kick", gate_kick, METH_NOARGS, "End the present or the next run soon; any thread."},
    {"take_error", gate_take_error, METH_NOARGS, "(exception | None, engine's error code) of the last run."},
    {"hooks", gate_hooks, METH_NOARGS, "Addresses of the callbacks by name, and their user pointer."},
    {"mmio_window", gate_mmio_window, METH_O, "User pointer for the MMIO callbacks of a window at this address."},
    {"get_events", gate_get_events, METH_NOARGS, "(halted, inflight, exception, code, nmi_pending)"},
    {"set_events", gate_set_events, METH_VARARGS, "The inverse of get_events."},
    {"close", gate_close, METH_NOARGS, "Stop the pacer; idempotent."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot gate_slots[] = {
    {Py_tp_new, gate_new},         {Py_tp_dealloc, gate_dealloc}, {Py_tp_methods, gate_methods},
    {Py_tp_traverse, gate_traverse}, {Py_tp_clear, gate_clear},     {0, NULL},
};

static PyType_Spec gate_spec = {
    "vmf_cpu_unicorn._gate.Gate", sizeof(Gate), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC, gate_slots};

static int module_exec(PyObject *module)
{
    PyObject *type = PyType_FromSpec(&gate_spec);
    if (type == NULL || PyModule_AddObject(module, "Gate", type) < 0) {
        Py_XDECREF(type);
        return -1;
    }
    return PyModule_AddIntConstant(module, "CONFIG_SIZE", sizeof(Config));
}

static PyModuleDef_Slot module_slots[] = {{Py_mod_exec, module_exec}, {0, NULL}};

static struct PyModuleDef module_definition = {
    PyModuleDef_HEAD_INIT, .m_name = "vmf_cpu_unicorn._gate", .m_doc = "Native gate of the Unicorn backend.",
    .m_slots = module_slots};

PyMODINIT_FUNC PyInit__gate(void)
{
    return PyModuleDef_Init(&module_definition);
}
