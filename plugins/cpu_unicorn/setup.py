"""The native gate is optional: without a compiler the package installs all the same and uses the other gate."""

import sys

from setuptools import Extension, setup

extensions = []
if sys.platform == "linux":
    extensions.append(
        Extension(
            "vmf_cpu_unicorn._gate",
            ["src/vmf_cpu_unicorn/_gate.c"],
            extra_compile_args=["-O2", "-std=gnu11", "-Wall", "-Wextra"],
            extra_link_args=["-pthread"],
            optional=True,
        )
    )

setup(ext_modules=extensions)
