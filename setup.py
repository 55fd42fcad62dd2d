"""Builds the native library: plain C++ behind a C interface, so that one wheel serves every torch and Python.

Each source in SIMD_SOURCES is compiled once per instruction set; the library picks one at run time. Without a C++
compiler, or with SNELL_NO_NATIVE=1, the package is pure Python: its wheel is py3-none-any and layers on the CPU use the
PyTorch backend. A compiler that is there and fails is an error, since a slow package is not what its user expects.

Where nvcc is on the PATH, the CUDA library is built beside it. The package does not need it, so an nvcc that fails is a
warning.
"""

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CCompilerError, CompileError

X86 = platform.machine().lower() in ("x86_64", "amd64")
ISAS = {"v4": ["-march=x86-64-v4", "-mprefer-vector-width=512"], "v3": ["-march=x86-64-v3"]} if X86 else {}
SIMD_SOURCES = [f"csrc/cpu/{name}.cpp" for name in ("merge", "select", "factor_grad", "softmax", "red")]
FLAGS = ["-std=c++17", "-O3", "-fopenmp", "-fvisibility=hidden", "-fno-math-errno", "-ffp-contract=off", "-Wall", "-g0"]
FLAGS += ["-Wno-maybe-uninitialized", "-Wno-uninitialized"]  # GCC's own AVX-512 header trips them

CUDA = "snell._cuda"
CUDA_SOURCES = ["csrc/cuda/select.cu"]
CUDA_ARCHITECTURES = (80, 90, 100)
CUDA_FLAGS = ["-std=c++17", "-O3", "-shared", "-cudart=static", "-Xcompiler=-fPIC,-fvisibility=hidden", "--threads=0"]

WITHOUT = "snell without its native library: layers on the CPU run on the PyTorch backend, several times slower"


def why_pure():
    """Why the native library is not built; None where it is."""
    if os.environ.get("SNELL_NO_NATIVE", "") not in ("", "0"):
        return "SNELL_NO_NATIVE is set"
    if sys.platform != "linux":
        return "it is built on Linux only"
    # The compiler that setuptools will call.
    command = shlex.split(os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++")[0]
    return None if shutil.which(command) else f"there is no C++ compiler ({command}); CXX names another"


PURE = why_pure()


class BuildPython(build_py):
    def run(self):
        if PURE:
            print(f"warning: {WITHOUT} ({PURE})", file=sys.stderr)
        super().run()


class BuildNative(build_ext):
    """Compile the sources per instruction set."""

    def get_ext_filename(self, fullname):
        return fullname.replace(".", "/") + ".so"

    def build_extension(self, ext):
        if ext.name == CUDA:
            return self._build_with_nvcc(ext)
        try:
            self._build(ext)
        except CCompilerError as error:
            advice = f"Correct what the compiler reports above, or set SNELL_NO_NATIVE=1 to install {WITHOUT}."
            raise CompileError(f"the native library could not be built: {error}\n{advice}") from error

    def _build(self, ext):
        variants = {"base": [], **{isa: flags for isa, flags in ISAS.items() if self._accepts(flags)}}
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            jobs = [
                pool.submit(self._compile, source, isa, [*flags, f"-DSNELL_ISA={isa}"])
                for isa, flags in variants.items()
                for source in SIMD_SOURCES
            ]
        objects = [name for job in jobs for name in job.result()]
        have = ["-DSNELL_ISA=base", *(f"-DSNELL_HAVE_{isa.upper()}" for isa in variants)]
        objects += [name for source in ext.sources for name in self._compile(source, "main", have)]
        self.compiler.link_shared_object(
            objects, self.get_ext_fullpath(ext.name), extra_postargs=["-fopenmp"], target_lang="c++"
        )

    def _build_with_nvcc(self, ext):
        listed = subprocess.run(["nvcc", "--list-gpu-arch"], capture_output=True, text=True, check=False).stdout.split()
        known = [arch for arch in CUDA_ARCHITECTURES if f"compute_{arch}" in listed]
        targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in known]
        # Devices of later architectures compile it from PTX.
        targets += [f"-gencode=arch=compute_{arch},code=compute_{arch}" for arch in known[-1:]]
        path = self.get_ext_fullpath(ext.name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        if os.path.exists(path):
            os.remove(path)  # an earlier build's, which nvcc would leave where it fails
        why = "" if known else f"it knows none of the architectures {CUDA_ARCHITECTURES}"
        if known:
            command = ["nvcc", *CUDA_FLAGS, *targets, *ext.sources, "-o", path]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            why = done.stderr.strip() or f"exit status {done.returncode}" if done.returncode else ""
        if why:
            print(f"warning: snell without its CUDA library: nvcc failed: {why}", file=sys.stderr)

    def _accepts(self, flags):
        """Whether the compiler knows the instruction set; an older one does without it."""
        probe = [*self.compiler.compiler_so_cxx, *flags, "-E", "-x", "c++", os.devnull]
        known = subprocess.run(probe, capture_output=True, check=False).returncode == 0
        if not known:
            print(f"warning: {probe[0]} does not know {flags[0]}: the native library does without it", file=sys.stderr)
        return known

    def _compile(self, source, folder, flags):
        return self.compiler.compile([source], output_dir=f"{self.build_temp}/{folder}", extra_postargs=FLAGS + flags)


class Wheel(bdist_wheel):
    """The library is loaded with ctypes: any Python 3 and no ABI, but this platform."""

    def get_tag(self):
        python, abi, platform_tag = super().get_tag()
        return ("py3", "none", platform_tag) if self.distribution.ext_modules else (python, abi, platform_tag)


FOLDERS = {"snell": "snell", "snell.kernels": "kernels", "snell.bench": "bench"}


def packages():
    for package, folder in FOLDERS.items():
        yield package
        yield from (f"{package}.{name}" for name in find_packages(folder))


def extensions():
    if PURE:
        return
    yield Extension("snell._native", ["csrc/cpu/library.cpp"], language="c++")
    if shutil.which("nvcc"):
        # optional: a wheel or an editable installation does without its file.
        yield Extension(CUDA, CUDA_SOURCES, language="c++", optional=True)


setup(
    packages=list(packages()),
    package_dir=FOLDERS,
    include_package_data=False,  # figures, sources and scripts stay in the source archive
    ext_modules=list(extensions()),
    cmdclass={"build_py": BuildPython, "build_ext": BuildNative, "bdist_wheel": Wheel},
)
