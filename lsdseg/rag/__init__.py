"""Region adjacency graphs: fragments are nodes, scored contacts are edges, kept where all workers can reach them.

A store is one module and one entry in STORES; `lsdseg.rag.store` says what the module holds. The library behind a
store is imported when a store of that kind is opened, so that nobody needs the libraries of the others.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from yacs.config import CfgNode

from lsdseg.config.implementations import resolve
from lsdseg.errors import UserError
from lsdseg.rag.store import Mode, RagStore

if TYPE_CHECKING:
    from lsdseg.rag.mongo import MongoStore
    from lsdseg.rag.parquet import ParquetStore

__all__ = ["STORES", "MongoStore", "ParquetStore", "RagStore", "open_store"]

# Scheme of a URI -> "module:function", called as function(uri, cfg, output, mode, fragments) to open a store of that
# kind. The empty scheme stands for an empty URI.
STORES = {
    "": "lsdseg.rag.parquet:open_parquet",
    "mongodb": "lsdseg.rag.mongo:open_mongodb",
    "mongodb+srv": "lsdseg.rag.mongo:open_mongodb",
}
# A URI without a scheme, such as HOST:PORT.
DEFAULT_SCHEME = "mongodb"


def open_store(cfg: CfgNode, output: Path | str, mode: Mode = "r", fragments: str = "") -> RagStore:
    """Open the graph of the sample that an output zarr holds.

    Args:
        cfg: the loaded config. The URI in the environment variable LSD_DB_URI, or else in DATA.DB_HOST, selects the
            store by its scheme (see STORES). If both are empty, the graph is Parquet files beside the zarr.
        output: SAMPLE.zarr.
        mode: "r" to read, "r+" to read and write, "x" to create, "w" to drop an existing graph first; see `RagStore`.
        fragments: id of the fragments that the graph must be of. Empty: any.

    Returns:
        The open store.

    Raises:
        UserError: there is no store for the URI, or the server or the graph cannot be used. A server that does not
            answer is reported within 10 seconds.
    """
    uri = os.environ.get("LSD_DB_URI") or cfg.DATA.DB_HOST
    scheme = _scheme(uri)
    if scheme not in STORES:
        # Only the scheme is shown: the rest of the URI may hold a password.
        known = ", ".join(f"{name}://" for name in STORES if name)
        raise UserError(
            f"LSD_DB_URI or DATA.DB_HOST begins with {scheme}://, but there is no such graph store: use {known} or "
            "HOST:PORT (MongoDB), or leave it empty for Parquet files beside the output"
        )
    store: RagStore = resolve(STORES[scheme])(uri, cfg, Path(output), mode, fragments)
    return store


def _scheme(uri: str) -> str:
    """The scheme of a URI. HOST:PORT has none."""
    if not uri:
        return ""
    name, colon, rest = uri.partition(":")
    if colon and rest.startswith("//"):
        return name
    if name in STORES:
        raise UserError(f"LSD_DB_URI or DATA.DB_HOST begins with {name}: but a URI begins with {name}://")
    return DEFAULT_SCHEME


def __getattr__(name: str) -> Any:
    """Import the store classes when they are first asked for, as `open_store` does."""
    classes = {"MongoStore": "lsdseg.rag.mongo:MongoStore", "ParquetStore": "lsdseg.rag.parquet:ParquetStore"}
    if name not in classes:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return resolve(classes[name])
