"""Where a payload lies: small ones in the database, large ones in files, or in parts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from optserve.store.base import CHUNK_BYTES, BytesLike, Durability, Key, Payload, PayloadWriter
from optserve.store.database import Connection, Row
from optserve.store.files import FilePayload, PayloadFiles
from optserve.store.payloads import INLINE_BYTES, InlinePayload, Spool
from optserve.store.schema import PART_BYTES, Sql
from optserve_client.errors import Damaged

EVENT, FRAME = 0, 1


@dataclass(slots=True)
class Placed:
    """A payload that can be committed: its bytes are in the row, in a file, or go into parts."""

    payload: Payload
    file: FilePayload | None = None
    #: The file is a copy, made for the commit.
    copied: bool = False

    def columns(self) -> Row:
        return {
            "payload_bytes": self.payload.nbytes,
            "payload_digest": self.payload.digest,
            "payload_file": self.file.name if self.file else None,
        }

    def give_up(self) -> None:
        """Remove the copy. What the caller brought stays the caller's."""
        if self.copied and self.file is not None:
            self.file.discard()


class LostPayload:
    """A payload that a row names and nobody can find."""

    def __init__(self, nbytes: int, digest: bytes, why: str) -> None:
        self.nbytes = nbytes
        self.digest = digest
        self.why = why

    def chunks(self, size: int = CHUNK_BYTES) -> Iterator[memoryview]:
        raise Damaged(self.why)

    def pread(self, nbytes: int, at: int) -> bytes:
        raise Damaged(self.why)

    def read(self) -> bytes:
        raise Damaged(self.why)

    def discard(self) -> None:
        """Nothing to do: nothing is there."""


class Placing:
    """Puts payloads where they belong and finds them again."""

    def __init__(self, sql: Sql, files: PayloadFiles | None) -> None:
        self._sql = sql
        self.files = files
        self._spool = Spool() if files is None else None

    def writer(
        self, size_hint: int | None, durability: Durability, read_soon: bool = False
    ) -> PayloadWriter:
        if self.files is not None:
            return self.files.writer(size_hint, durability, read_soon)
        assert self._spool is not None
        return self._spool.writer(size_hint)

    def place(self, payload: Payload) -> Placed:
        """Return ``payload`` where a row can name it; a copy if this store did not write it so."""
        if payload.nbytes <= INLINE_BYTES or self.files is None:
            return Placed(payload)
        if isinstance(payload, FilePayload):
            return Placed(payload, payload)
        writer = self.files.writer(payload.nbytes, "always")
        try:
            for chunk in payload.chunks():
                writer.write(chunk)
            copy = writer.seal()
        finally:
            writer.discard()
        assert isinstance(copy, FilePayload)
        return Placed(copy, copy, copied=True)

    def put_parts(self, tx: Connection, values: Row, frame: int, payload: Payload) -> None:
        """Write a payload that has no file."""
        row = {"tenant": values["tenant"], "session": values["session"], "lsn": values["lsn"]}
        pieces: Iterator[BytesLike]
        if payload.nbytes <= INLINE_BYTES:
            pieces = iter([payload.read()])
        else:
            pieces = payload.chunks(PART_BYTES)
        for part, data in enumerate(pieces):
            tx.run(self._sql["part"], {**row, "frame": frame, "part": part, "data": data})

    def find(
        self, connection: Connection, key: Key, row: Row, frame: int, data: bytes | None = None
    ) -> Payload | None:
        """Return the payload that ``row`` names; None if it was dropped meanwhile.

        ``data``: its bytes, where they were read with the row. One that is missing or incomplete
        is returned all the same, and its reads raise Damaged.
        """
        nbytes, digest = row["payload_bytes"], bytes(row["payload_digest"])
        if data is not None:
            return InlinePayload(bytes(data), digest)
        if (name := row["payload_file"]) is None:
            return self._from_parts(connection, key, row, frame)
        if self.files is None:
            why = f"payload file {name}: the store was opened without its files; name them"
            return LostPayload(nbytes, digest, why)
        try:
            return self.files.open(name, nbytes, digest)
        except Damaged as exc:
            return LostPayload(nbytes, digest, exc.detail)

    def _from_parts(self, connection: Connection, key: Key, row: Row, frame: int) -> Payload:
        """Copy the parts out of the database, which may drop them while they are read."""
        writer = self.writer(row["payload_bytes"], "memory")
        where = {"k_tenant": key.tenant, "k_session": key.session, "k_frame": frame}
        try:
            part = 0
            while True:
                at = {**where, "k_lsn": row["lsn"], "k_part": part}
                if not (data := connection.column(self._sql["read_part"], at)):
                    break
                writer.write(data[0])
                part += 1
            nbytes, digest = row["payload_bytes"], bytes(row["payload_digest"])
            if part == 0 or writer.nbytes != nbytes or writer.digest() != digest:
                why = (
                    f"a payload of session {key.session!r} at lsn {row['lsn']} has "
                    f"{writer.nbytes} of {nbytes} bytes, or others than it had"
                )
                return LostPayload(nbytes, digest, why)
            return writer.seal()
        finally:
            writer.discard()

    def close(self) -> None:
        if self.files is not None:
            self.files.close()
        if self._spool is not None:
            self._spool.close()
