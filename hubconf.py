"""What torch.hub looks for in a repository: the official names, see hub.entry_points.

    model = torch.hub.load("/path/to/this/folder", "dinov2_vits14", source="local")          # backbones
    classifier = torch.hub.load("/path/to/this/folder", "dinov2_vits14_lc", source="local")  # and with a linear head
    depther = torch.hub.load("/path/to/this/folder", "dinov2_vits14_dd", source="local", weights="NYU")  # or DPT, ...

The files here have plain names, such as model.py, and the caller may have modules of the same names. So ours are loaded
apart, as _dinov2_model, _dinov2_hub and so on; the caller's are not touched, whether they were imported before
or come after. A whole model can be pickled, but only a process that has called torch.hub.load can read it; state_dict()
has no such limit. Apache License 2.0.
"""
import importlib.util as _util
import os as _os
import sys as _sys

dependencies = ["torch", "numpy", "tqdm"]


def _load_apart(*names):
    """The last of our modules, named in the order in which they import each other."""
    folder = _os.path.dirname(_os.path.abspath(__file__))
    last = _sys.modules.get(f"_dinov2_{names[-1]}")
    if last is not None and _os.path.dirname(last.__file__) == folder:  # classes stay the same from call to call
        return last
    theirs = {name: _sys.modules.pop(name) for name in names if name in _sys.modules}
    try:
        for name in names:
            spec = _util.spec_from_file_location(f"_dinov2_{name}", _os.path.join(folder, f"{name}.py"))
            last = _util.module_from_spec(spec)
            _sys.modules[name] = _sys.modules[spec.name] = last
            spec.loader.exec_module(last)
    finally:
        for name in names:
            _sys.modules.pop(name, None)
        _sys.modules.update(theirs)
    return last


globals().update(_load_apart("model", "heads", "mask2former", "hub").entry_points())
