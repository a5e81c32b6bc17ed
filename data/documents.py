"""Files to documents. Everything streams: memory does not grow with the size of a file.

read_documents(path, options) yields (text, last, position): a document comes in one or more pieces of at most
PIECE bytes, `last` marks its last one, and position is how far the file has been read, in stored bytes. A row
of JSON or parquet that is null or blank is the document "", for whoever reads them to count and leave out.
"""

import gzip
import importlib
import io
import json
import lzma
import os
import re
import zlib
from dataclasses import dataclass

import numpy as np

from nanotst import UserError

TEXT, JSON = (".txt", ".md", ".py"), (".jsonl", ".ndjson")
PACKED = ("", ".gz", ".xz", ".zst")
SUFFIXES = (*(kind + packed for kind in TEXT + JSON for packed in PACKED), ".parquet")
PIECE = 256 * 1024  # bytes: longer documents are tokenised in pieces of at most this size
OTHER_ENCODINGS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}  # by their byte-order marks


@dataclass
class Options:
    """How the documents lie in the files."""

    separator: str = "<|endoftext|>"  # the line between documents of a text file
    field: str = "text"  # of JSON objects, or the column of a parquet file
    cut: int = 0  # bytes after which a document of a text file is ended by itself ...
    cut_at: str = ""  # ... at "empty lines", "line ends" or "words"
    seed: int | None = None  # read the row groups of a parquet file in an order of this seed


def needs(module, why):
    """A module of a package that only some corpora need."""
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.split(".")[0]
        raise UserError(f"{why} needs the package {package}: pip install {package}") from None


def kind(path):
    """ "text", "json" or "parquet", by the suffix in any case. A file of another suffix is text."""
    name = path.lower().removesuffix(".gz").removesuffix(".xz").removesuffix(".zst")
    return "parquet" if name.endswith(".parquet") else "json" if name.endswith(JSON) else "text"


def read_documents(path, options):
    """Yield (text, last, position) of the documents in a file. UserError names file and place."""
    if kind(path) == "parquet":
        yield from parquet_documents(path, options)
        return
    try:
        with open(path, "rb") as stored, unpacked(stored, path) as file:
            read = json_documents if kind(path) == "json" else text_documents
            for text, last in read(file, path, options):
                yield text, last, stored.tell()
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as e:
        reason = getattr(e, "strerror", None) or str(e) or "it is cut short"
        raise UserError(f"cannot read {path}: {reason}") from None


def unpacked(stored, path):
    if path.lower().endswith(".gz"):
        return gzip.open(stored)
    if path.lower().endswith(".xz"):
        return lzma.open(stored)
    if path.lower().endswith(".zst"):
        return io.BufferedReader(ZstdFile(stored, path), PIECE)
    return stored


class ZstdFile(io.RawIOBase):
    """The text of a .zst file of any number of frames. zstandard's own reader takes a file that is cut short
    for a whole one."""

    def __init__(self, stored, path):
        self.stored, self.zstd = stored, needs("zstandard", path)
        self.frame, self.ready = None, memoryview(b"")

    def readable(self):
        return True

    def readinto(self, buffer):
        try:
            while not self.ready:
                unused = self.frame.unused_data if self.frame and self.frame.eof else b""
                if not (data := unused or self.stored.read(PIECE // 8)):
                    if self.frame and not self.frame.eof:
                        raise EOFError("it is cut short")
                    return 0
                if self.frame is None or self.frame.eof:
                    self.frame = self.zstd.ZstdDecompressor().decompressobj()
                self.ready = memoryview(self.frame.decompress(data))
        except self.zstd.ZstdError as e:
            raise OSError(str(e)) from None
        n = min(len(buffer), len(self.ready))
        buffer[:n], self.ready = self.ready[:n], self.ready[n:]
        return n


def without_mark(line, path):
    """The first line of a file without its byte-order mark."""
    for mark, encoding in OTHER_ENCODINGS.items():
        if line.startswith(mark):
            raise UserError(f"{path} is {encoding}, not UTF-8 text: convert it first")
    return line.removeprefix(b"\xef\xbb\xbf")


def cut_point(data, limit):
    """data: the next limit + 2 bytes of a long document -> where to cut it, at most limit.

    Before a single space between two words, because the split patterns of GPT-2, its successors and Llama 3
    all start a new piece of text there, so the tokens are those of the uncut document. Text without such a
    place (base64, Chinese) is cut at a line end, or else between two characters, and its tokens may differ
    from the uncut ones there.
    """
    if match := re.match(rb"(?s).*[A-Za-z](?= [A-Za-z])", data):
        return match.end()
    cut = data.rfind(b"\n", 0, limit) + 1 or limit
    while cut > 1 and data[cut] & 0xC0 == 0x80:  # inside of a UTF-8 character
        cut -= 1
    return cut


def blocks(file, path):
    """Yield (block, offset, line_start): a text file in blocks of whole lines (of PIECE or less)."""
    offset, line_start = 0, True
    while block := file.read(PIECE) + file.readline(PIECE):
        n_stored, block = len(block), block if offset else without_mark(block, path)
        yield block, offset + n_stored - len(block), line_start
        offset, line_start = offset + n_stored, block.endswith(b"\n")


def text_documents(file, path, options):
    """Yield (text, last). The line end before a separator or the end of the file belongs to no document."""
    separator = options.separator.encode()
    end = re.escape(separator) + rb"\r*(?:\n|\Z)" if separator else rb"\r*\n"
    cut_here = {"empty lines": rb"|[ \t\r]*\n", "line ends": rb"|"}.get(options.cut_at, b"")
    # a pattern that begins with plain text is searched for several times faster than one with ^
    anchor = rb"(?m)^" if cut_here or not separator else b""
    ends = re.compile(anchor + rb"(?:(?P<separator>" + end + b")" + cut_here + b")")
    at_words = options.cut if options.cut_at == "words" else 0
    buffer, offset, started = (
        bytearray(),
        0,
        False,
    )  # offset: in the file, of the buffer; started: a document

    def decode(data):
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as e:
            raise UserError(f"{path} is not UTF-8 text (byte {offset + e.start:,})") from None

    def long_pieces():
        nonlocal offset, started
        limit = at_words or PIECE
        while len(buffer) > limit + 2:
            cut = cut_point(buffer[: limit + 2], limit)
            yield decode(bytes(buffer[:cut])), bool(at_words)
            offset, started = offset + cut, not at_words
            del buffer[:cut]

    def last_piece():
        nonlocal started
        yield from long_pieces()
        text = decode(bytes(buffer)).removesuffix("\n").removesuffix("\r")
        if started or text.strip():
            yield text, True
        buffer.clear()
        started = False

    size = 0  # of the document so far
    for block, start, line_start in blocks(file, path):
        taken = 0
        offset = offset if buffer else start
        for match in ends.finditer(block):
            too_early = not match["separator"] and size + match.start() - taken < options.cut
            inside_line = block[match.start() - 1] != 10 if match.start() else not line_start
            if too_early or inside_line:
                continue
            buffer += block[taken : match.start()]
            yield from last_piece()
            taken = match.end()
            offset, size = start + taken, 0
        buffer += block[taken:]
        size += len(block) - taken
        yield from long_pieces()
    yield from last_piece()


def json_documents(file, path, options):
    """Yield (text, last) of a file with one JSON object per line."""
    for number, line in enumerate(file, 1):
        if number == 1:
            line = without_mark(line, path)
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as e:  # also UnicodeDecodeError; nested too deeply
            raise UserError(f"{where} is not valid JSON: {e}") from None
        if not (isinstance(row, dict) and isinstance(row.get(options.field, 0), str | None)):
            raise UserError(f"{where} has no text in field '{options.field}' (see --field)")
        yield from in_pieces(row[options.field] or "")


def parquet_documents(path, options):
    """Yield (text, last, position), row group by row group."""
    parquet, arrow = needs("pyarrow.parquet", path), needs("pyarrow", path)
    try:
        with parquet.ParquetFile(path, pre_buffer=False, buffer_size=2**20) as file:
            if options.field not in file.schema_arrow.names:
                raise UserError(f"{path} has no column '{options.field}' (see --field)")
            size, n_rows, rows = os.path.getsize(path), file.metadata.num_rows, 0
            groups = np.arange(file.num_row_groups)
            if options.seed is not None:
                groups = np.random.default_rng(options.seed).permutation(groups)
            for group in groups.tolist():
                batches = file.iter_batches(
                    512, row_groups=[group], columns=[options.field], use_threads=False
                )
                for text in (text for batch in batches for text in batch.column(0).to_pylist()):
                    rows += 1
                    if not isinstance(text, str | None):
                        raise UserError(
                            f"{path} has no text in column '{options.field}' (row group {group})"
                        )
                    for piece, last in in_pieces(text or ""):
                        yield piece, last, size * rows // n_rows
    except (OSError, arrow.ArrowException) as e:
        raise UserError(f"cannot read {path}: {' '.join(str(e).split())[:200]}") from None


def in_pieces(text):
    """Yield (piece, last) of a document that is in memory."""
    data = text.encode(
        "utf-8", errors="replace"
    )  # JSON can hold half a surrogate pair: becomes "?"
    start = 0
    while len(data) - start > PIECE + 2:
        cut = start + cut_point(data[start : start + PIECE + 2], PIECE)
        yield data[start:cut].decode(), False
        start = cut
    yield data[start:].decode() if start or text.strip() else "", True
