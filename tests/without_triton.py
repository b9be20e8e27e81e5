"""A plugin of pytest, `-p without_triton`: this process finds no installed triton.

What else calls itself triton they still find, as a folder of that name on the path of imports.
"""

import importlib.machinery
import sys
import sysconfig

INSTALLED = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}


class WithoutTriton(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, fullname, path=None, target=None):
        if fullname == "triton":
            path = [p for p in path or sys.path if p not in INSTALLED]
        return super().find_spec(fullname, path, target)


sys.meta_path = [
    WithoutTriton if finder is importlib.machinery.PathFinder else finder
    for finder in sys.meta_path
]
