"""Builds the optional CPU kernels; everything else is in pyproject.toml."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


class BuildKernels(build_ext):
    """Adds -fopenmp where the compiler takes it. A failing build leaves the pure-torch path (optional=True)."""

    def build_extension(self, ext: Extension) -> None:
        if self.compiler.compiler_type != "msvc":
            ext.extra_compile_args += ["-O3", "-ffp-contract=off", "-fvisibility=hidden"]
            if self._compiles_and_links("-fopenmp"):
                ext.extra_compile_args.append("-fopenmp")
                ext.extra_link_args.append("-fopenmp")
            else:
                print("compress_peft: no OpenMP, the CPU kernels will use one thread", file=sys.stderr)
        super().build_extension(ext)

    def _compiles_and_links(self, flag: str) -> bool:
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "probe.c")
            source.write_text("#include <omp.h>\nint probe(void) { return omp_get_max_threads(); }\n")
            try:
                objects = self.compiler.compile([str(source)], output_dir=folder, extra_postargs=[flag])
                self.compiler.link_shared_object(objects, str(Path(folder, "probe.so")), extra_postargs=[flag])
            except Exception:  # any compiler or linker failure means the same: not available
                return False
        return True


FOLDER = Path("compress_peft", "csrc")
SOURCES = [
    str(FOLDER / name)
    for name in ("cpu.c", "nf4.c", "affine.c", "dense.c", "norm.c", "attention.c", "prefill.c", "block.c")
]
HEADERS = [str(FOLDER / name) for name in ("common.h", "kernels.h", "affine_x86.h", "exp_x86.h", "prefill_x86.h")]

setup(
    ext_modules=[Extension("compress_peft._kernels", SOURCES, depends=HEADERS, optional=True)],
    cmdclass={"build_ext": BuildKernels},
)
