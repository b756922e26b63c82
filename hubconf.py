"""What torch.hub looks for in a repository: the official entry points, see hub.entry_points.

    model = torch.hub.load("/path/to/this/folder", "dinov2_vits14", source="local")          # a backbone
    classifier = torch.hub.load("/path/to/this/folder", "dinov2_vits14_lc", source="local")  # with a linear classifier
    depther = torch.hub.load("/path/to/this/folder", "dinov2_vits14_dd", source="local", weights="NYU")  # with DPT

The files here have plain names, such as model.py, and a caller may have modules of the same names. So ours are imported
under private names (_dinov2_model, _dinov2_hub, ...), and the caller's modules stay untouched, whether they were
imported before or come after. A pickled whole model can therefore be read only by a process that has called
torch.hub.load; use state_dict() to avoid that. Apache License 2.0.
"""
import importlib.util as _util
import os as _os
import sys as _sys

dependencies = ["torch", "numpy", "tqdm"]


def _load_apart(*names):
    """Imports our modules, listed in the order in which they import each other, and returns the last one."""
    folder = _os.path.dirname(_os.path.abspath(__file__))
    private = {name: f"_dinov2_{name.replace('.', '_')}" for name in names}
    last = _sys.modules.get(private[names[-1]])
    if last is not None and _os.path.dirname(last.__file__) == folder:  # keep the same classes from call to call
        return last
    theirs = {name: _sys.modules.pop(name) for name in names if name in _sys.modules}
    try:
        for name in names:
            path = _os.path.join(folder, *name.split(".")) + ".py"
            spec = _util.spec_from_file_location(private[name], path)
            last = _util.module_from_spec(spec)
            # `from support.cli import x` finds this entry without looking at any package `support`, ours or theirs.
            _sys.modules[name] = _sys.modules[private[name]] = last
            spec.loader.exec_module(last)
    finally:
        for name in names:
            _sys.modules.pop(name, None)
        _sys.modules.update(theirs)
    return last


globals().update(_load_apart(
    "model", "heads", "mask2former", "data", "support.parallel", "support.machine", "support.suggest", "support.cli",
    "support.files", "support.weights", "hub").entry_points())
