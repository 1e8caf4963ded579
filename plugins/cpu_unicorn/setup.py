"""The native gate is optional: without a compiler the package installs all the same and uses the other gate."""

import platform
import sys

from setuptools import Extension, setup

HERE = "src/vmf_cpu_unicorn"
SOURCES = {
    "_gate": ("_gate", "_gate_hooks", "_gate_pacer"),
    "_stores": ("_stores",),
}
HEADERS = ("_gate.h", "_floats.h", "_floats_x87.h", "_slots.h", "_corrections.h")
if platform.machine() in ("x86_64", "AMD64"):  # these execute the host's own instructions
    SOURCES["_floats"] = ("_floats", "_floats_sse", "_floats_x87", "_floats_moves")
    SOURCES["_corrections"] = ("_corrections", "_corrections_code", "_corrections_system")

extensions = []
if sys.platform == "linux":
    extensions += [
        Extension(
            f"vmf_cpu_unicorn.{name}",
            [f"{HERE}/{source}.c" for source in sources],
            depends=[f"{HERE}/{header}" for header in HEADERS],
            extra_compile_args=["-O2", "-std=gnu11", "-Wall", "-Wextra", "-fvisibility=hidden"],
            extra_link_args=["-pthread", "-ldl"],
            optional=True,
        )
        for name, sources in SOURCES.items()
    ]

setup(ext_modules=extensions)
