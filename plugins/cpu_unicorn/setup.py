"""The native gate is optional: without a compiler the package installs all the same and uses the other gate."""

import sys

from setuptools import Extension, setup

extensions = []
if sys.platform == "linux":
    extensions += [
        Extension(
            f"vmf_cpu_unicorn.{name}",
            [f"src/vmf_cpu_unicorn/{name}.c"],
            extra_compile_args=["-O2", "-std=gnu11", "-Wall", "-Wextra"],
            extra_link_args=["-pthread", "-ldl"],
            optional=True,
        )
        for name in ("_gate", "_stores")
    ]

setup(ext_modules=extensions)
