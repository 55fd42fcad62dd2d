"""Builds the native library: plain C++ behind a C interface, so one wheel serves every torch and Python.

Each source in SIMD_SOURCES is compiled once per instruction set and the library picks at run time.
"""

import os
import platform
import sys
from concurrent.futures import ThreadPoolExecutor

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

X86 = platform.machine().lower() in ("x86_64", "amd64")
ISAS = {"v4": ["-march=x86-64-v4", "-mprefer-vector-width=512"], "v3": ["-march=x86-64-v3"]} if X86 else {}
SIMD_SOURCES = ["csrc/cpu/merge.cpp", "csrc/cpu/select.cpp", "csrc/cpu/factor_grad.cpp"]
FLAGS = ["-std=c++17", "-O3", "-fopenmp", "-fvisibility=hidden", "-fno-math-errno", "-ffp-contract=off", "-Wall", "-g0"]
FLAGS += ["-Wno-maybe-uninitialized"]  # GCC's own AVX-512 header trips it


class BuildNative(build_ext):
    """Compile per instruction set; without a compiler the package installs all the same (optional)."""

    def get_ext_filename(self, fullname):
        return fullname.replace(".", "/") + ".so"

    def build_extension(self, ext):
        variants = {"base": [], **ISAS}
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            jobs = {
                isa: [
                    pool.submit(self._compile, source, isa, [*flags, f"-DSNELL_ISA={isa}"]) for source in SIMD_SOURCES
                ]
                for isa, flags in variants.items()
            }
        objects, built = [], []
        for isa, parts in jobs.items():
            # An older compiler may not know the newer sets: the library then does without them.
            if isa == "base" or not any(part.exception() for part in parts):
                objects += [name for part in parts for name in part.result()]
                built.append(isa)
        have = ["-DSNELL_ISA=base", *(f"-DSNELL_HAVE_{isa.upper()}" for isa in built)]
        objects += [name for source in ext.sources for name in self._compile(source, "main", have)]
        self.compiler.link_shared_object(
            objects, self.get_ext_fullpath(ext.name), extra_postargs=["-fopenmp"], target_lang="c++"
        )

    def _compile(self, source, folder, flags):
        return self.compiler.compile(
            [source], output_dir=f"{self.build_temp}/{folder}", extra_postargs=FLAGS + flags, depends=DEPENDS
        )


class PlatformWheel(bdist_wheel):
    """The library is loaded with ctypes: any Python 3, no ABI, this platform."""

    def finalize_options(self):
        super().finalize_options()
        self.root_is_pure = False

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


DEPENDS = ["csrc/api.h", *(f"csrc/cpu/{name}.h" for name in ("simd", "kappa", "tiles", "merge"))]

PACKAGES = [
    "snell",
    "snell.backends",
    "snell.bench",
    "snell.bench.experiments",
    "snell.bench.paper",
    "snell.cli",
    "snell.competition",
    "snell.kernels",
    "snell.peft",
    "snell.peft.common",
    "snell.peft.snell",
    "snell.testing",
]

setup(
    packages=PACKAGES,
    package_dir={"snell.kernels": "kernels", "snell.bench": "bench"},
    ext_modules=[Extension("snell._native", ["csrc/cpu/library.cpp"], depends=DEPENDS, language="c++", optional=True)]
    if sys.platform != "win32"
    else [],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": PlatformWheel},
)
