"""The graph in MongoDB, for many workers on many machines, in the layout that LSD users' databases already have.

Database DATA.DB_NAME; collections {sample}_nodes (id, center_z, center_y, center_x), {sample}_edges_{merge_function}
(u, v, merge_score, agglomerated) and {sample}_meta. Graphs that other LSD scripts wrote there can be read.

A block is written by deleting its id range and inserting its rows. A worker that dies in between leaves a part of
them, and the block is not done, so whoever does it next replaces that part. Two workers on one block write the same
rows, and the unique index on the ids refuses the second copy. A server that goes away is waited for; since every
request can be repeated as a whole, it does not matter how much of it was done.

Credentials stay inside the client: whatever this module prints or raises holds the server's address only.
"""

import logging
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

import numpy as np
import pymongo
from bson import MinKey
from pymongo.errors import AutoReconnect, BulkWriteError, CursorNotFound, PyMongoError

from lsdseg.errors import UserError
from lsdseg.rag.store import AGGLOMERATED, NODES, Columns, RagStore, columns_of, is_table

log = logging.getLogger(__name__)
Result = TypeVar("Result")

# Rows of a streamed batch: as Python objects they take some 50 MB for a moment.
BATCH = 100_000
# Seconds until a server counts as absent, and how long one may be away in the middle of the work.
SELECTION_SECONDS = 4
PATIENCE_SECONDS = 300
# MongoDB's integers are signed, with 64 bits.
LARGEST_ID = 2**63 - 1
UNAUTHORIZED, AUTHENTICATION_FAILED, DUPLICATE_KEY = 13, 18, 11000


class MongoStore(RagStore):
    """The graph of one sample in a MongoDB database.

    Fragment ids from 2^63 on are refused with a UserError. A score of NaN is null in the database.

    Args:
        uri: "mongodb://..." with the credentials and TLS options that pymongo knows, or "host:port".
        database: name of the database.
        sample: what the names of the collections begin with.
        voxels_in_block: see `lsdseg.rag.store`.
        mode: see `RagStore`.
        origin: says of which output this is the graph; a graph of another one is refused.

    Raises:
        UserError: within 10 seconds, if no server answers or it does not let us in.
    """

    def __init__(self, uri: str, database: str, sample: str, voxels_in_block: int, mode: str = "r", origin: str = ""):
        milliseconds = SELECTION_SECONDS * 1000
        try:
            client = pymongo.MongoClient(
                uri if "://" in uri else f"mongodb://{uri}",
                serverSelectionTimeoutMS=milliseconds,
                connectTimeoutMS=milliseconds,
            )
        except (PyMongoError, ValueError, OSError):
            raise UserError(
                "the MongoDB URI in LSD_DB_URI or DATA.DB_HOST cannot be used: it must be HOST:PORT or "
                "mongodb://USER:PASSWORD@HOST:PORT/?OPTIONS, with special characters of user and password as %XX, "
                "and the files that options such as tlsCAFile name must be readable"
            ) from None
        servers = client.topology_description.server_descriptions()
        self._address = ",".join(f"{host}:{port}" for host, port in servers)
        # Journaled on a majority of servers: what a done block wrote survives a crash.
        self._database = client.get_database(
            database,
            write_concern=pymongo.WriteConcern("majority", j=True),
            read_preference=pymongo.ReadPreference.PRIMARY,
        )
        self._sample = sample
        self._indexed = set()  # tables whose ids this process knows to be indexed
        self._patience = 0  # a server that is not there at the start is a mistake; one that goes away will be back
        self._tables()
        self._patience = PATIENCE_SECONDS
        super().__init__(mode, {"voxels_in_block": voxels_in_block, "output": origin})

    def __repr__(self):
        return f"{self._sample} (database {self._database.name}, MongoDB at {self._address})"

    def finish(self) -> None:
        """Index the centres, for tools that ask for the nodes of a region."""
        centers = list(columns_of(NODES))[1:]
        self._patiently(lambda: self._collection(NODES).create_index(centers, name="position"))

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

        def replace():
            self._index_ids(table)
            collection.delete_many(in_block)
            if rows:
                _insert(collection, rows)

        self._patiently(replace)

    def _read(self, table: str, first_id: int, last_id: int) -> Columns:
        names = list(columns_of(table))
        found = self._collection(table).find(_in_range(table, first_id, last_id), names, batch_size=BATCH)
        return self._columns(table, names, self._patiently(lambda: list(found.clone())))

    def _stream(self, table: str, names: list[str]) -> Iterator[Columns]:
        # Page by page, not with one cursor: a cursor ends with its server, or while the caller works on a batch.
        last = MinKey()

        def page():
            rest = self._collection(table).find({"_id": {"$gt": last}}, names, batch_size=BATCH)
            return list(rest.sort("_id").limit(BATCH))

        while rows := self._patiently(page):
            last = rows[-1]["_id"]
            yield self._columns(table, names, rows)

    def _tables(self) -> list[str]:
        prefix = f"{self._sample}_"
        names = self._patiently(self._database.list_collection_names)
        return [n.removeprefix(prefix) for n in names if n.startswith(prefix) and is_table(n.removeprefix(prefix))]

    def _drop(self, table: str) -> None:
        self._patiently(self._collection(table).drop)
        self._indexed.discard(table)

    def _read_settings(self) -> dict | None:
        return self._patiently(lambda: self._collection("meta").find_one({"_id": "settings"}, {"_id": False}))

    def _write_settings(self) -> None:
        meta = self._collection("meta")
        self._patiently(lambda: meta.replace_one({"_id": "settings"}, self._settings, upsert=True))

    def _collection(self, name: str) -> pymongo.collection.Collection:
        return self._database[f"{self._sample}_{name}"]

    def _index_ids(self, table: str) -> None:
        """Make the unique index that a table's writes and range reads rest on, and so the table itself."""
        if table not in self._indexed:
            # The names are those of the other scripts' indexes: MongoDB refuses a second name for the same index.
            name = "id" if table == NODES else "incident"
            self._collection(table).create_index(_identity(table), name=name, unique=True)
            self._indexed.add(table)

    def _columns(self, table: str, names: list[str], rows: list[dict]) -> Columns:
        try:
            return {name: _array([row[name] for row in rows], columns_of(table)[name]) for name in names}
        except (KeyError, TypeError, ValueError, OverflowError):
            raise UserError(
                f"collection {self._collection(table).name} of {self} holds documents without numbers "
                f"{', '.join(names)}: it is no region adjacency graph; choose another DATA.DB_NAME"
            ) from None

    def _patiently(self, request: Callable[[], Result]) -> Result:
        """The result of a request, which is made again as long as the server is away, up to `_patience` seconds."""
        began = time.monotonic()
        pause = 0.5
        while True:
            try:
                return request()
            except PyMongoError as error:
                if not _server_is_away(error):
                    raise self._refusal(error) from None
            away = time.monotonic() - began
            if away >= self._patience:
                raise UserError(
                    f"no MongoDB server answers at {self._address} (tried for {away:.0f} s): start it, or correct "
                    "DATA.DB_HOST or LSD_DB_URI (address, port, TLS options)"
                )
            log.warning("MongoDB at %s is away since %.0f s, trying again in %.1f s", self._address, away, pause)
            time.sleep(pause)
            pause = min(2 * pause, 10)

    def _refusal(self, error: PyMongoError) -> UserError:
        """What the server refused, without the request, which may hold anything."""
        if getattr(error, "code", None) in (UNAUTHORIZED, AUTHENTICATION_FAILED):
            return UserError(
                f"MongoDB at {self._address} does not accept the user name or password for database "
                f"{self._database.name}: set LSD_DB_URI to mongodb://USER:PASSWORD@HOST:PORT/?authSource=admin"
            )
        reason = (getattr(error, "details", None) or {}).get("codeName") or type(error).__name__
        return UserError(f"MongoDB at {self._address} gave up with {reason}: its log says more")


def _identity(table: str) -> list[str]:
    """The columns that identify a row."""
    return ["id"] if table == NODES else ["u", "v"]


def _in_range(table: str, first_id: int, last_id: int) -> dict:
    """The query for the rows of an id range."""
    return {_identity(table)[0]: {"$gte": min(first_id, LARGEST_ID), "$lte": min(last_id, LARGEST_ID)}}


def _documents(table: str, columns: Columns) -> list[dict]:
    constant = {} if table == NODES else {AGGLOMERATED: True}
    values = [column.tolist() for column in columns.values()]
    if table != NODES:
        values[-1] = [None if score != score else score for score in values[-1]]
    return [{**dict(zip(columns, row, strict=True)), **constant} for row in zip(*values, strict=True)]


def _insert(collection: pymongo.collection.Collection, rows: list[dict]) -> None:
    """Insert rows, but for those that another worker on the same block has inserted meanwhile."""
    try:
        collection.insert_many(rows, ordered=False)
    except BulkWriteError as error:
        errors = error.details["writeErrors"] + error.details["writeConcernErrors"]
        if any(e["code"] != DUPLICATE_KEY for e in errors):
            raise


def _array(values: list, dtype: type) -> np.ndarray:
    """Values as an array of that type: None as NaN, float centres rounded to whole nm."""
    if dtype is np.float32:
        return np.array(values, dtype)
    array = np.array(values)
    return (np.rint(array) if array.dtype.kind == "f" else array).astype(dtype)


def _server_is_away(error: PyMongoError) -> bool:
    return isinstance(error, AutoReconnect | CursorNotFound) or error.has_error_label("RetryableWriteError")
