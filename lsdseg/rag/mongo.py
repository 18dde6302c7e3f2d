"""The graph in MongoDB, for many workers on many machines, in the layout that other LSD scripts use too.

The database is DATA.DB_NAME. It holds the collections {sample}_nodes (id, center_z, center_y, center_x),
{sample}_edges_{merge_function} (u, v, merge_score, agglomerated) and {sample}_meta. Graphs that the published LSD
scripts wrote can be read.

Writing a block deletes its id range and inserts its rows. A worker that dies in between leaves some of them; the block
is then not done, and whoever does it next replaces them. Two workers on the same block write the same rows, and the
unique index on the ids refuses the second copy. If the server goes away, requests wait for it. Each request can be
repeated as a whole, so it does not matter how much of it had been done.

Credentials stay inside the client: messages and log lines contain the address of the server and nothing else.
"""

import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pymongo
from bson import MinKey
from numpy.typing import NDArray
from pymongo.collection import Collection
from pymongo.errors import AutoReconnect, BulkWriteError, CursorNotFound, PyMongoError
from yacs.config import CfgNode

from lsdseg.data_utils.layout import sample_name
from lsdseg.errors import UserError
from lsdseg.rag.store import (
    AGGLOMERATED,
    NODES,
    REMEDY,
    Columns,
    Mode,
    RagStore,
    Record,
    columns_of,
    is_table,
    voxels_in_block,
)

log = logging.getLogger(__name__)
Result = TypeVar("Result")
Document = dict[str, Any]

# Rows of a streamed batch. As Python objects they take about 50 MB for a moment.
BATCH = 100_000
# How long to look for a server before a request fails, and how long to repeat requests that fail.
SELECTION_SECONDS = 4
RETRY_SECONDS = 300
# Integers in MongoDB are signed and have 64 bits.
LARGEST_ID = 2**63 - 1
UNAUTHORIZED, AUTHENTICATION_FAILED, DUPLICATE_KEY = 13, 18, 11000
# Last parts of the path of SAMPLE.zarr that identify an output: MODEL_TYPE, {2d,3d}, RUN, CHECKPOINT, SAMPLE.zarr.
OUTPUT_PARTS = 5


def open_mongodb(uri: str, cfg: CfgNode, output: Path, mode: Mode, fragments: str = "") -> "MongoStore":
    """Open the graph of SAMPLE.zarr in the database DATA.DB_NAME on the server of the URI.

    Collections are named by the sample alone, so the output is recorded with the graph: two checkpoints must not mix
    their graphs. Only the last parts of its path count, because machines may mount a folder in different places.
    """
    origin = "/".join(output.absolute().parts[-OUTPUT_PARTS:])
    return MongoStore(uri, cfg.DATA.DB_NAME, sample_name(output), voxels_in_block(cfg), mode, origin, fragments)


class MongoStore(RagStore):
    """The graph of one sample in a MongoDB database.

    Fragment ids from 2^63 on are refused with a UserError. A score of NaN is null in the database.

    Args:
        uri: "mongodb://..." or "mongodb+srv://..." with the options for credentials and TLS that pymongo knows, or
            "host:port".
        database: name of the database.
        sample: prefix of the names of the collections.
        voxels_in_block: number of voxels in a block; see `lsdseg.rag.store`.
        mode: see `RagStore`.
        origin: the output that the graph belongs to; the graph of another output is refused.
        fragments: id of the fragments that the graph is of; the graph of others is refused. Empty: any.

    Raises:
        UserError: within 10 seconds if no server answers or the server refuses the user; otherwise as `RagStore`.
    """

    def __init__(
        self,
        uri: str,
        database: str,
        sample: str,
        voxels_in_block: int,
        mode: Mode = "r",
        origin: str = "",
        fragments: str = "",
    ) -> None:
        client = _client(uri)
        servers = client.topology_description.server_descriptions()
        self._address = ",".join(f"{host}:{port}" for host, port in servers)
        # Journaled on a majority of servers: the rows of a finished block survive a crash.
        self._database = client.get_database(
            database,
            write_concern=pymongo.WriteConcern("majority", j=True),
            read_preference=pymongo.ReadPreference.PRIMARY,
        )
        self._sample = sample
        self._indexed: set[str] = set()  # tables that this process knows to have an index on their ids
        # A server that is absent at the start is a mistake; one that goes away later will come back. A worker (the
        # supervisor marks it) starts in the middle of a run whose master has reached the server.
        self._retry_seconds = RETRY_SECONDS if os.environ.get("LSD_WORKER") else 0
        self._tables()
        self._retry_seconds = RETRY_SECONDS
        super().__init__(mode, voxels_in_block, output=origin, fragments=fragments)

    def __repr__(self) -> str:
        return f"{self._sample} (database {self._database.name}, MongoDB at {self._address})"

    def _tidy(self) -> None:
        """Index the centers, for tools that ask for the nodes of a region."""
        centers = list(columns_of(NODES))[1:]
        self._with_retries(lambda: self._collection(NODES).create_index(centers, name="position"))

    def _replace(self, table: str, block: int, columns: Columns) -> None:
        largest = max((int(ids.max()) for ids in columns.values() if ids.dtype == np.uint64 and ids.size), default=0)
        if largest > LARGEST_ID:
            raise UserError(
                f"fragment id {largest} is too large for MongoDB, which takes ids below 2^63: "
                "leave DATA.DB_HOST empty, or choose a smaller INS_SEGMENT.BLOCK_SIZE"
            )
        rows = _documents(table, columns)
        in_block = _in_range(table, *self.id_range(block))
        collection = self._collection(table)

        def replace() -> None:
            self._index_ids(table)
            collection.delete_many(in_block)
            if rows:
                _insert(collection, rows)

        self._with_retries(replace)

    def _read(self, table: str, first_id: int, last_id: int) -> Columns:
        names = list(columns_of(table))
        found = self._collection(table).find(_in_range(table, first_id, last_id), names, batch_size=BATCH)
        return self._columns(table, names, self._with_retries(lambda: list(found.clone())))

    def _stream(self, table: str, names: list[str]) -> Iterator[Columns]:
        # One query per page: a single cursor ends if its server does, or if the caller works on a batch for long.
        last: Any = MinKey()

        def page() -> list[Document]:
            rest = self._collection(table).find({"_id": {"$gt": last}}, names, batch_size=BATCH)
            return list(rest.sort("_id").limit(BATCH))

        while rows := self._with_retries(page):
            last = rows[-1]["_id"]
            yield self._columns(table, names, rows)

    def _count(self, table: str) -> int:
        return self._with_retries(lambda: self._collection(table).count_documents({}))

    def _tables(self) -> list[str]:
        prefix = f"{self._sample}_"
        names = self._with_retries(self._database.list_collection_names)
        return [n.removeprefix(prefix) for n in names if n.startswith(prefix) and is_table(n.removeprefix(prefix))]

    def _drop(self, table: str) -> None:
        self._with_retries(self._collection(table).drop)
        self._indexed.discard(table)

    def _read_record(self, name: str) -> Record | None:
        return self._with_retries(lambda: self._collection("meta").find_one({"_id": name}, {"_id": False}))

    def _write_record(self, name: str, record: Record | None) -> None:
        meta = self._collection("meta")
        if record is None:
            self._with_retries(lambda: meta.delete_one({"_id": name}))
        else:
            self._with_retries(lambda: meta.replace_one({"_id": name}, record, upsert=True))

    def _collection(self, name: str) -> Collection[Document]:
        return self._database[f"{self._sample}_{name}"]

    def _index_ids(self, table: str) -> None:
        """Make the unique index that writes and range reads rely on. This also creates the collection."""
        if table not in self._indexed:
            # These are the names that the published scripts use: MongoDB refuses a second name for the same index.
            name = "id" if table == NODES else "incident"
            self._collection(table).create_index(_key_columns(table), name=name, unique=True)
            self._indexed.add(table)

    def _columns(self, table: str, names: list[str], rows: list[Document]) -> Columns:
        try:
            return {name: _array([row[name] for row in rows], columns_of(table)[name]) for name in names}
        except (KeyError, TypeError, ValueError, OverflowError):
            raise UserError(
                f"collection {self._collection(table).name} of {self} is not part of a region adjacency graph: "
                f"some documents have no numbers {', '.join(names)} that it can have; choose another DATA.DB_NAME, or "
                f"{REMEDY.format('02 and 03')}, to replace it"
            ) from None

    def _with_retries(self, request: Callable[[], Result]) -> Result:
        """Make a request, and repeat it for up to `_retry_seconds` while the server is away.

        Args:
            request: a function that can be called again after any failure.

        Returns:
            What the request returns.

        Raises:
            UserError: the server stays away or refuses the request.
        """
        began = time.monotonic()
        pause = 0.5
        while True:
            try:
                return request()
            except PyMongoError as error:
                if not _is_temporary(error):
                    raise self._user_error(error) from None
            away = time.monotonic() - began
            if away >= self._retry_seconds:
                raise UserError(
                    f"no MongoDB server answers at {self._address} (tried for {away:.0f} s): start it, or correct "
                    "DATA.DB_HOST or LSD_DB_URI (address, port, TLS options)"
                )
            log.warning("MongoDB at %s has not answered for %.0f s, retrying in %.1f s", self._address, away, pause)
            time.sleep(pause)
            pause = min(2 * pause, 10)

    def _user_error(self, error: PyMongoError) -> UserError:
        """Say why the server refused a request. The request is left out, because it may contain anything."""
        if getattr(error, "code", None) in (UNAUTHORIZED, AUTHENTICATION_FAILED):
            return UserError(
                f"MongoDB at {self._address} does not accept the user name or password for database "
                f"{self._database.name}: set LSD_DB_URI to mongodb://USER:PASSWORD@HOST:PORT/?authSource=admin"
            )
        reason = (getattr(error, "details", None) or {}).get("codeName") or type(error).__name__
        return UserError(f"MongoDB at {self._address} failed with {reason}: see its log for details")


def _client(uri: str) -> pymongo.MongoClient[Document]:
    """Make a client for a URI or HOST:PORT. It connects with the first request.

    Raises:
        UserError: the URI or one of its options cannot be used.
    """
    milliseconds = int(SELECTION_SECONDS * 1000)
    try:
        return pymongo.MongoClient(
            uri if uri.startswith(("mongodb://", "mongodb+srv://")) else f"mongodb://{uri}",
            serverSelectionTimeoutMS=milliseconds,
            connectTimeoutMS=milliseconds,
        )
    except (PyMongoError, ValueError, OSError):
        raise UserError(
            "the MongoDB URI in LSD_DB_URI or DATA.DB_HOST cannot be used: it must be HOST:PORT or "
            "mongodb://USER:PASSWORD@HOST:PORT/?OPTIONS, with special characters in user and password written as "
            "%XX, and the files that options such as tlsCAFile name must be readable"
        ) from None


def _key_columns(table: str) -> list[str]:
    """Return the columns that identify a row."""
    return ["id"] if table == NODES else ["u", "v"]


def _in_range(table: str, first_id: int, last_id: int) -> Document:
    """Return the query for the rows of an id range."""
    return {_key_columns(table)[0]: {"$gte": min(first_id, LARGEST_ID), "$lte": min(last_id, LARGEST_ID)}}


def _documents(table: str, columns: Columns) -> list[Document]:
    constant = {} if table == NODES else {AGGLOMERATED: True}
    values = [column.tolist() for column in columns.values()]
    if table != NODES:
        values[-1] = [None if score != score else score for score in values[-1]]
    return [{**dict(zip(columns, row, strict=True)), **constant} for row in zip(*values, strict=True)]


def _insert(collection: Collection[Document], rows: list[Document]) -> None:
    """Insert rows, except for those that another worker on the same block has inserted in the meantime."""
    try:
        collection.insert_many(rows, ordered=False)
    except BulkWriteError as error:
        errors = error.details["writeErrors"] + error.details["writeConcernErrors"]
        if any(e["code"] != DUPLICATE_KEY for e in errors):
            raise


def _array(values: list[Any], dtype: type[np.generic]) -> NDArray[Any]:
    """Convert values to an array of this type. None becomes NaN, and float centers are rounded to whole nm.

    Raises:
        ValueError: some are no numbers, or none that the type can hold.
    """
    if dtype is np.float32:
        values = [math.nan if value is None else value for value in values]
    array = np.array(values) if values else np.empty(0, dtype)
    if array.ndim != 1 or array.dtype.kind not in ("iu" if dtype is np.uint64 else "iuf"):
        raise ValueError("no numbers")
    if dtype is np.float32:
        return array.astype(dtype)
    whole = np.rint(array) if array.dtype.kind == "f" else array
    least = 0 if dtype is np.uint64 else -LARGEST_ID
    if not ((whole >= least) & (whole < LARGEST_ID)).all():
        raise ValueError(f"numbers that are not in {least}..{LARGEST_ID - 1}")
    return whole.astype(dtype)


def _is_temporary(error: PyMongoError) -> bool:
    """Return whether the same request may succeed later."""
    return isinstance(error, AutoReconnect | CursorNotFound) or error.has_error_label("RetryableWriteError")
