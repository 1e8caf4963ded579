/* Floating point and strings by the host's own processor.
 *
 * Theory of operation
 * -------------------
 * The engine computes floating point in software. Its flags never reach MXCSR, it raises no exception, it computes the
 * x87's transcendental functions in double precision, and a few of its SSSE3 and SSE4.2 operations are wrong. The host
 * is an x86-64 processor itself. So each helper is replaced (_slots.h) by one that has the host execute the very
 * instruction, on the guest's operands and under the guest's control word, and that takes over result and flags.
 *
 * An exception that the guest has not masked must not be raised in the host. For SSE everything is masked while the
 * host computes; which flags an unmasked operation would have shown, and whether it would have been done, follows from
 * those of the masked one (_floats_sse.c). An x87 exception is raised only by the next instruction that waits: so the
 * guest's masks stay in force, the state is taken by FXSAVE and thrown away by FNINIT, neither of which waits
 * (_floats_x87.h). The guest gets its exception from the engine, which finds the instruction by the helper's return
 * address.
 *
 * One process has one set of helpers, whether an engine is ours or not. They touch nothing but the CPU structure that
 * they are given, and the thread's own MXCSR and x87 state, which they leave as they found it, flags apart.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "_floats.h"

FloatsConfig floats_at;

static bool installed;

#define ROOMS 3

/* Everything or nothing: what one room changes, others rely on. */
static bool install(void *handle)
{
    const Slot *parts[ROOMS];
    const size_t counts[ROOMS] = {floats_sse_slots(&parts[0]), floats_x87_slots(&parts[1]), floats_moves_slots(&parts[2])};
    Slot *slots = malloc((counts[0] + counts[1] + counts[2]) * sizeof *slots);
    if (slots == NULL)
        return false;
    size_t count = 0;
    for (int n = 0; n < ROOMS; n++) {
        memcpy(slots + count, parts[n], counts[n] * sizeof *slots);
        count += counts[n];
    }
    bool done = slots_replace(handle, slots, count);
    free(slots);
    return done;
}

static PyObject *floats_install(PyObject *self, PyObject *arguments)
{
    unsigned long long handle;
    Py_buffer words;
    (void)self;
    if (!PyArg_ParseTuple(arguments, "Ky*", &handle, &words))
        return NULL;
    bool right = words.len == sizeof floats_at;
    if (right && !installed)
        memcpy(&floats_at, words.buf, sizeof floats_at);
    PyBuffer_Release(&words);
    if (!right)
        return PyErr_Format(PyExc_ValueError, "install() takes %zu bytes", sizeof floats_at);
    /* SSE4.2 has come after everything else that is executed here. */
    if (!installed && __builtin_cpu_supports("sse4.2"))
        installed = install((void *)(uintptr_t)handle);
    return PyBool_FromLong(installed);
}

static PyMethodDef methods[] = {
    {"install", floats_install, METH_VARARGS,
     "install(handle, config): replace the helpers of the library that dlopen gave this handle for, before its first\n"
     "engine is opened. False when the host lacks SSE4.2 or the library is not as expected."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, .m_name = "_floats", .m_size = -1, .m_methods = methods};

PyMODINIT_FUNC PyInit__floats(void)
{
    return PyModule_Create(&module);
}
