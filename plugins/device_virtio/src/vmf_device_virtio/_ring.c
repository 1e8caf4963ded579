/* Taking an indirect table of descriptors apart (virtio 1.2, section 2.7.5.3), for the requests of a hundred buffers that
 * drivers of disks make: in Python it is a tenth of the vCPU thread's time. Only what is quite ordinary is done here; all
 * else, right or wrong, is left to queue.py, which does the same without this module, and says what is wrong.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

enum { NEXT = 1, WRITE = 2, INDIRECT = 4 };

typedef struct {
    uint64_t address;
    uint32_t length;
    uint16_t flags, next;
} Descriptor;

static PyObject *take(PyObject *self, PyObject *arguments)
{
    (void)self;
    Py_buffer table, rows;
    unsigned long long low;
    if (!PyArg_ParseTuple(arguments, "y*Kw*", &table, &low, &rows))
        return NULL;
    Py_ssize_t count = table.len / (Py_ssize_t)sizeof(Descriptor), readable = 0;
    uint64_t bytes[2] = {0, 0};
    bool fine = count > 0 && rows.len >= count * 16;
    for (Py_ssize_t n = 0; fine && n < count; n++) {
        Descriptor d; /* a copy: what is checked is what is used */
        memcpy(&d, (const char *)table.buf + n * sizeof d, sizeof d);
        bool last = n == count - 1, writable = d.flags & WRITE;
        fine = !(d.flags & INDIRECT) && (last ? !(d.flags & NEXT) : d.flags & NEXT && d.next == n + 1) && d.length &&
               d.address <= low && d.length <= low - d.address && (writable || readable == n);
        readable += !writable;
        bytes[writable] += d.length;
        uint64_t row[2] = {d.address, d.length};
        memcpy((char *)rows.buf + n * sizeof row, row, sizeof row);
    }
    PyBuffer_Release(&table);
    PyBuffer_Release(&rows);
    if (!fine)
        Py_RETURN_NONE;
    return Py_BuildValue("(nKK)", readable, (unsigned long long)bytes[0], (unsigned long long)bytes[1]);
}

static PyMethodDef methods[] = {
    {"take", take, METH_VARARGS,
     "take(table, low, rows): fill the rows (address, length) of a table that is one chain in order, all of it below\n"
     "`low`; (readable descriptors, bytes in them, bytes in the writable ones), or None when it is anything else."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, .m_name = "_ring", .m_size = -1, .m_methods = methods};

PyMODINIT_FUNC PyInit__ring(void)
{
    return PyModule_Create(&module);
}
