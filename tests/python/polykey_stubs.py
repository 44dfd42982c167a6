"""The published Python stubs of `polykey.v2`, loaded from a directory without installing their wheel.

The wheel (`spounge-proto-py` 0.2.9) carries copies of `google` and other top-level packages that
hide the real ones, so only its `spounge/` folder is unpacked. A bare package module of that name is
registered in place of the wheel's own `spounge/__init__.py`, which would import every package of it.
"""

import importlib
import pathlib
import sys
import types

WHEEL = "spounge-proto-py==0.2.9"

MODULES = (
    "auth_pb2",
    "batch_operations_pb2",
    "common_pb2",
    "key_types_pb2",
    "metrics_pb2",
    "service_pb2",
    "service_pb2_grpc",
    "single_operations_pb2",
    "stream_operations_pb2",
)


def load(directory):
    """Loads the stubs from `directory`, which holds the unzipped `spounge/` folder.

    Returns a namespace with a module for each name in `MODULES`, and `tier`, the module of
    `common.v2`. Raises FileNotFoundError when the folder is not there, and RuntimeError when another
    `spounge` was imported before from elsewhere.
    """
    package = (pathlib.Path(directory) / "spounge").resolve()
    if not (package / "polykey" / "v2" / "service_pb2.py").is_file():
        raise FileNotFoundError(f"{package}: no stubs here; unzip spounge/ of {WHEEL} into {directory}")
    loaded = sys.modules.get("spounge")
    if loaded is None:
        loaded = types.ModuleType("spounge")
        loaded.__path__ = [str(package)]
        sys.modules["spounge"] = loaded
    elif list(loaded.__path__) != [str(package)]:
        raise RuntimeError(f"spounge was imported from {list(loaded.__path__)} before")
    stubs = types.SimpleNamespace(tier=importlib.import_module("spounge.common.v2.common_pb2"))
    for name in MODULES:
        setattr(stubs, name, importlib.import_module(f"spounge.polykey.v2.{name}"))
    return stubs


def unpack(wheel, directory):
    """Unzips only the `spounge/` folder of the wheel file `wheel` into `directory`."""
    import zipfile

    with zipfile.ZipFile(wheel) as archive:
        names = [n for n in archive.namelist() if n.startswith("spounge/") and ".." not in n]
        if not names:
            raise ValueError(f"{wheel}: no spounge/ folder")
        archive.extractall(directory, names)
