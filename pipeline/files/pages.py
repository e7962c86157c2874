"""Parquet files that are opened only if their pages cannot fill the memory.

A Parquet file says its sizes twice: in the footer at its end, and in a header before every page. pyarrow allocates what
either says, and unpacks what follows; so both are read here first. Their headers are Thrift's compact protocol
(https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md), of which a header of a page needs
its fields 2 and 3 (https://github.com/apache/parquet-format/blob/master/src/main/thrift/parquet.thrift).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rats.pipeline.bounds import unfolded

_LIST_ITEMS, _TEXT = 1_000_000, 100_000_000
"""pyarrow's own limits on a footer, which hold for large files. A small one cannot have so many items."""
_HEADERS = (1 << 12, 1 << 16)
"""Bytes of a page's header that are read at first, and at most."""
_DEEPEST = 16
_LONGEST_INTEGER = 64
_UNPACKED, _PACKED = 2, 3
_BYTE, _INTEGERS, _DOUBLE, _BINARY, _LISTS, _STRUCT = 3, (4, 5, 6), 7, 8, (9, 10), 12
_TRUE_OR_FALSE = (1, 2)


def open_parquet(source: Any, size: int, **settings: Any) -> pq.ParquetFile:
    """Opens `source`, which has `size` bytes, with pyarrow: no list or text of its footer is longer than the file."""
    limits = {"thrift_container_size_limit": min(size, _LIST_ITEMS), "thrift_string_size_limit": min(size, _TEXT)}
    return pq.ParquetFile(source, **limits, **settings)


def page_sizes(about: Any, read: Callable[[int, int], bytes], columns: Sequence[str] | None = None) -> Iterator[Any]:
    """(packed, unpacked) bytes of every page of the columns by their headers, in place of what the footer says.

    Args:
        about: The file's metadata.
        read: Bytes of the file: `read(offset, length)`, fewer at its end.
        columns: Top-level names; all by default.

    Raises:
        ValueError: A page that does not lie in its column.
    """
    for group in map(about.row_group, range(about.num_row_groups)):
        for column in map(group.column, range(group.num_columns)):
            if columns is None or _is_of(column.path_in_schema, columns):
                yield from _pages(column, read)


def text_bytes(column: Any) -> int:
    """Total length of the texts in a dictionary-encoded array: rows may share one long text."""
    lengths = pc.take(pc.binary_length(column.dictionary), column.indices)
    return pc.sum(lengths).as_py() or 0


def check_texts(columns: Sequence[Any], size: int) -> None:
    """Raises ValueError if dictionary-encoded arrays of a file of `size` bytes unfold to too much text."""
    encoded = [column for column in columns if pa.types.is_dictionary(column.type)]
    texts = [column for column in encoded if pa.types.is_string(column.type.value_type)]
    if (total := sum(map(text_bytes, texts))) > unfolded(size):
        raise ValueError(f"{total} bytes of text in a file of {size}")


def _is_of(path: str, columns: Sequence[str]) -> bool:
    return any(path == name or path.startswith(f"{name}.") for name in columns)


def _pages(column: Any, read: Callable[[int, int], bytes]) -> Iterator[tuple[int, int]]:
    offsets = [column.data_page_offset, column.dictionary_page_offset]
    at = min((offset for offset in offsets if offset and offset > 0), default=0)
    end = at + column.total_compressed_size
    while at < end:
        length, packed, unpacked = _page(read, at)
        if packed < 0 or unpacked < 0 or at + length + packed > end:
            raise ValueError(f"a page of {packed} bytes, {unpacked} unpacked, at {at} in a column that ends at {end}")
        yield packed, unpacked
        at += length + packed


def _page(read: Callable[[int, int], bytes], at: int) -> tuple[int, int, int]:
    """Lengths of a page's header, of the page as it is stored, and unpacked."""
    for most in _HEADERS:
        header = _Thrift(read(at, most))
        try:
            numbers = header.integers()
            return header.at, numbers[_PACKED], numbers[_UNPACKED]
        except IndexError:
            continue  # a longer header, of which there is a larger piece
        except KeyError:
            break
    raise ValueError(f"no page at {at}")


class _Thrift:
    """A struct in Thrift's compact protocol. IndexError where the data end before it."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def integers(self) -> dict[int, int]:
        """The struct's integers by field; everything else is passed over."""
        found = {}
        for field, kind in self._fields():
            if kind in _INTEGERS:
                found[field] = self._integer()
            else:
                self._skip(kind, _DEEPEST)
        return found

    def _fields(self) -> Iterator[tuple[int, int]]:
        field = 0
        while head := self._byte():
            step, kind = head >> 4, head & 15
            field = field + step if step else self._integer()
            yield field, kind

    def _skip(self, kind: int, depth: int) -> None:
        if not depth:
            raise ValueError("a page's header is too deep")
        if kind in _INTEGERS:
            self._varint()
        elif kind in _LISTS:
            self._skip_list(depth)
        elif kind == _STRUCT:
            for _, inner in self._fields():
                self._skip(inner, depth - 1)
        elif kind not in _TRUE_OR_FALSE:  # those have no bytes of their own
            self._pass(kind)

    def _skip_list(self, depth: int) -> None:
        head = self._byte()
        count = head >> 4 if head < 0xF0 else self._varint()
        for _ in range(count):
            self._skip(_BYTE if head & 15 in _TRUE_OR_FALSE else head & 15, depth - 1)

    def _pass(self, kind: int) -> None:
        sizes = {_BYTE: 1, _DOUBLE: 8}
        if kind != _BINARY and kind not in sizes:
            raise ValueError(f"a page's header has a field of kind {kind}")
        length = self._varint() if kind == _BINARY else sizes[kind]
        self.at += length
        if self.at > len(self.data):
            raise IndexError

    def _integer(self) -> int:
        number = self._varint()
        return (number >> 1) ^ -(number & 1)

    def _varint(self) -> int:
        number = shift = 0
        while (byte := self._byte()) & 128 and shift < _LONGEST_INTEGER:
            number |= (byte & 127) << shift
            shift += 7
        return number | byte << shift

    def _byte(self) -> int:
        self.at += 1
        return self.data[self.at - 1]
