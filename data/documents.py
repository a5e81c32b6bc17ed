"""Files to documents, one by one: memory does not grow with the size of a file.

read_documents(path, options) yields the text of each. A null row of JSON or parquet is the document "", so
that the caller can count it.
"""

import gzip
import importlib
import io
import json
import lzma
import re
import zlib
from dataclasses import dataclass

from nanotst import UserError

TEXT, JSON = (".txt", ".md", ".py"), (".jsonl", ".ndjson", ".json")
PACKED = (".gz", ".xz", ".zst")
# what a folder is searched for, but for .json: it is more often settings than a corpus
SUFFIXES = {".parquet", *(kind + packed for kind in TEXT + JSON for packed in ("", *PACKED))}
SUFFIXES = tuple(sorted(SUFFIXES - {".json"}))
PIECE = 256 * 1024  # bytes: longer documents are tokenised in pieces of at most this size
MARK = b"\xef\xbb\xbf"  # byte-order mark that some programs write before UTF-8


@dataclass
class Options:
    """How files hold documents."""

    separator: str = "<|endoftext|>"  # line between the documents of a text file
    field: str = "text"  # field of JSON objects, or column of a parquet file
    val_fraction: float = 0.0  # share of the documents to hold out
    cut: int = 25_000_000  # bytes after which a text ends at the next empty line


def needs(module, why):
    """Import a module of a package that only some corpora need."""
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.split(".")[0]
        raise UserError(f"{why} needs the package {package}: pip install {package}") from None


def kind(path):
    """Return "text", "json" or "parquet", by the suffix in any case. Unknown suffixes are text."""
    name = re.sub(r"\.(gz|xz|zst)$", "", path.lower())
    return "parquet" if name.endswith(".parquet") else "json" if name.endswith(JSON) else "text"


def read_documents(path, options):
    """Yield the documents of a file. Raises UserError with the file and, if known, the place in it."""
    read = {"text": text_documents, "json": json_documents, "parquet": parquet_documents}
    try:
        with unpacked(path) as file:
            for where, text in read[kind(path)](file, path, options):
                if not isinstance(text, str | None):
                    raise UserError(f"{where} has no text in field '{options.field}' (see --field)")
                yield text or ""
    except UnicodeDecodeError as e:
        near = bytes(e.object[max(0, e.start - 30) : e.end])
        raise UserError(f"{path} is not UTF-8 text: convert what ends in {near}") from None
    except (OSError, EOFError, ValueError, lzma.LZMAError, zlib.error) as e:
        raise UserError(f"cannot read {path}: {getattr(e, 'strerror', None) or e}") from None


def unpacked(path):
    """Open a file for reading, without its compression."""
    name = path.lower()
    if name.endswith(".zst"):  # by pyarrow: the package zstandard takes half a file for a whole one
        stored = needs("pyarrow", path).input_stream(open(path, "rb"), compression="zstd")  # noqa: SIM115
        return io.BufferedReader(stored, PIECE)
    unpack = gzip.open if name.endswith(".gz") else lzma.open if name.endswith(".xz") else open
    return unpack(path, "rb")


def text_documents(file, path, options):
    """Yield (path, text) between separators, without the line end before a separator or the end of the file.
    After options.cut bytes a text ends at the next empty line; after three times as many at the next line
    end, after four times before a word."""
    separator, cut, most = options.separator.encode(), options.cut, 4 * options.cut
    text, line_start = bytearray(), True
    line = file.readline(min(PIECE, cut)).removeprefix(MARK)  # long lines come in parts
    while line or text:
        ends = line_start and line.rstrip(b"\r\n") == separator or not line
        if ends or line_start and len(text) >= cut and not line.strip():
            n = len(text)
        else:
            text += line
            n = len(text) if len(text) >= 3 * cut and line.endswith(b"\n") else 0
            n = cut_point(text[: most + 2], most) if len(text) > most + 2 else n
        if text[:n].strip():
            yield path, text[:n].decode().removesuffix("\n").removesuffix("\r")
        del text[:n]
        line_start = line.endswith(b"\n")
        line = file.readline(min(PIECE, cut))


def json_documents(file, path, options):
    """Yield (path:line, text) of a file with one JSON object per line."""
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)  # skips a byte-order mark
        except (ValueError, RecursionError) as e:  # not UTF-8, too, or nested too deeply
            raise UserError(f"{path}:{number} is not valid JSON: {e}") from None
        yield f"{path}:{number}", row.get(options.field, 0) if isinstance(row, dict) else 0


def parquet_documents(file, path, options):
    """Yield (path, text) of a column, row group by row group."""
    parquet = needs("pyarrow.parquet", path)
    table = parquet.ParquetFile(file, pre_buffer=False, buffer_size=2**20)
    if options.field not in table.schema_arrow.names:
        raise UserError(f"{path} has no column '{options.field}' (see --field)")
    # few rows at a time, since a small file can hold the same long text many times
    for batch in table.iter_batches(16, columns=[options.field], use_threads=False):
        yield from ((path, row.as_py()) for row in batch.column(options.field))


def pieces(text):
    """Yield a document in pieces that can be tokenised one by one."""
    data, start = text.encode("utf-8", errors="replace"), 0  # half a surrogate pair becomes "?"
    while len(data) - start > PIECE + 2:
        stop = start + cut_point(data[start : start + PIECE + 2], PIECE)
        yield data[start:stop].decode()
        start = stop
    yield data[start:].decode()


def cut_point(data, limit):
    """data: the next limit + 2 bytes of a long document -> where to cut it, at most limit.

    Before a single space between two words, because the split patterns of GPT-2, its successors and Llama 3
    all start a new piece there: the tokens are the same as without cuts. Text without such a place
    (base64, Chinese) is cut at a line end, or else between two characters; its tokens may differ there.
    """
    if match := re.match(rb"(?s).*[A-Za-z](?= [A-Za-z])", data):
        return match.end()
    cut = data.rfind(b"\n", 0, limit) + 1 or limit
    while cut > 1 and data[cut] & 0xC0 == 0x80:  # inside a UTF-8 character
        cut -= 1
    return cut
