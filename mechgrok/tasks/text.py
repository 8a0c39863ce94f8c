"""Real text without a download: Python's own standard library, and any text file or folder.

"code" is the library's modules without their docstrings, a module a document. "prose" is those docstrings,
a module's together, and the topics of `help()`. Its tests are left out, and `encodings`, which is tables.
Sources are read, never imported or run.
"""

import ast
import hashlib
import importlib.util
import inspect
import os
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from mechgrok.errors import ConfigError
from mechgrok.store import cached_json
from mechgrok.task_config import STANDARD_LIBRARY, TextConfig
from mechgrok.tasks.documents import Document, text_split
from mechgrok.types import Split

MOST = 20_000_000  # bytes of a folder or file that are used
PIECE = 8_000  # characters of a document, at least, where a single file is cut into documents

_TOPICS = "pydoc_data/topics.py"
_NO_SOURCES = {"site-packages", "dist-packages", "__pycache__", "encodings", "test", "tests", "idle_test"}
_OF_THIS_BUILD = ("_sysconfigdata", "config-")  # they hold paths of the machine that built Python


def make_split(config: TextConfig, seed: int) -> Split:
    """Rows of tokens of the text that `config.sources` names; see `documents.text_split`.

    Raises:
        ConfigError: a path that is missing, empty or no UTF-8 text, or too little text for the settings.
    """
    library = standard_library() if set(config.sources) & set(STANDARD_LIBRARY) else {}
    texts = [library[source] if source in STANDARD_LIBRARY else read_path(source) for source in config.sources]
    return text_split(dict(zip(config.names, texts, strict=True)), config, seed)


def standard_library() -> dict[str, list[Document]]:
    """The "code" and the "prose" of Python's standard library; the two parts of a module have one key."""
    root = Path(sysconfig.get_path("stdlib"))
    files = {path.relative_to(root).as_posix(): path for path in _modules(root)}
    contents = {name: files[name].read_bytes() for name in sorted(files)}
    if not contents:
        raise ConfigError(
            f"this Python keeps no sources of its standard library under {root}; name text files or folders as sources"
        )
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    key = {"standard library": digests, "python": sys.version, "format": 1}
    both = cached_json(key, lambda: _code_and_prose(contents))
    return {kind: [Document(key, text) for key, text in pairs] for kind, pairs in both.items()}


def code_and_docstrings(source: str) -> tuple[str, str]:
    """A module's source without its docstrings, and these, joined by empty lines.

    A docstring that shares a line with code stays.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the source's own escapes
        tree = ast.parse(source)
    lines = source.split("\n")
    docstrings, gone = [], set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        docstring = ast.get_docstring(node, clean=False)
        if docstring is None:
            continue
        docstrings.append((node.body[0].lineno, inspect.cleandoc(docstring)))
        first, last = node.body[0].lineno - 1, (node.body[0].end_lineno or 0) - 1
        before = lines[first].encode()[: node.body[0].col_offset]
        after = lines[last].encode()[node.body[0].end_col_offset :]
        if not (before + after).strip():
            gone |= set(range(first, last + 1))
    code = "\n".join(line for number, line in enumerate(lines) if number not in gone)
    return code, "\n\n".join(text for _, text in sorted(docstrings))


def read_path(source: str) -> list[Document]:
    """The documents of a text file or a folder: each file of a folder is one, hidden ones and links to folders aside.

    A single file is cut at line ends into documents of about PIECE characters. Of more than MOST bytes a
    part is used that depends on the files' names alone.

    Raises:
        ConfigError: there is no such path, no text in it, or a file that is no UTF-8 text.
    """
    try:
        return _of_file(Path(source)) if Path(source).is_file() else _of_folder(Path(source))
    except OSError as error:
        raise ConfigError(
            f"cannot read {error.filename or source} ({error.strerror}); make it readable or correct the path"
        ) from None


def _of_file(path: Path) -> list[Document]:
    pieces = {f"{i:08d}": piece for i, piece in enumerate(_pieces(_read(path)))}
    kept = _part({key: len(piece.encode()) for key, piece in pieces.items()})
    return [Document(f"{path}#{key}", pieces[key]) for key in kept]


def _of_folder(path: Path) -> list[Document]:
    if not path.is_dir():
        raise ConfigError(f"the text source {path} is neither a file nor a folder; correct the path")
    files = {file.relative_to(path).as_posix(): file for file in path.rglob("*") if _is_shown_file(file, path)}
    if not files:
        raise ConfigError(f"the text source {path} is a folder without files; put UTF-8 text files into it")
    kept = _part({key: file.stat().st_size for key, file in files.items()})
    return [Document(f"{path}#{key}", _read(files[key])) for key in kept]


def _code_and_prose(contents: dict[str, bytes]) -> dict[str, list[tuple[str, str]]]:
    """(key, text) of every document."""
    code, prose = [], []
    for name, content in contents.items():
        try:
            if name == _TOPICS:
                prose += [(f"topic {topic}", text) for topic, text in sorted(_topics(content).items())]
                continue
            source, docstrings = code_and_docstrings(importlib.util.decode_source(content))
        except (SyntaxError, ValueError):  # some libraries ship templates and files of another Python
            continue
        code.append((name, source))
        # A docstring's escapes can spell what is no character.
        prose.append((name, docstrings.encode("utf-8", "replace").decode("utf-8")))
    return {"code": code, "prose": prose}


def _topics(content: bytes) -> dict[str, str]:
    """The dictionary that the module assigns to `topics`, read as a literal."""
    for node in ast.parse(content).body:
        if isinstance(node, ast.Assign) and [getattr(target, "id", "") for target in node.targets] == ["topics"]:
            return ast.literal_eval(node.value)
    return {}


def _modules(root: Path) -> Iterator[Path]:
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in _NO_SOURCES and not name.startswith(_OF_THIS_BUILD)]
        yield from (
            Path(folder, name) for name in files if name.endswith(".py") and not name.startswith(_OF_THIS_BUILD)
        )


def _is_shown_file(path: Path, folder: Path) -> bool:
    return not any(part.startswith(".") for part in path.relative_to(folder).parts) and path.is_file()


def _part(sizes: dict[str, int]) -> list[str]:
    """Keys whose sizes come to MOST and a last one more, in the order of the SHA-256 of their names; then sorted."""
    kept, taken = [], 0
    for key in sorted(sizes, key=lambda key: hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()):
        if taken >= MOST:
            break
        kept.append(key)
        taken += sizes[key]
    return sorted(kept)


def _pieces(text: str) -> Iterator[str]:
    """The text cut after the first line that ends at PIECE characters or more, again and again."""
    lines: list[str] = []
    length = 0
    for line in text.splitlines(keepends=True):
        lines.append(line)
        length += len(line)
        if length >= PIECE:
            yield "".join(lines)
            lines, length = [], 0
    if lines:
        yield "".join(lines)


def _read(path: Path) -> str:
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path} is no UTF-8 text (byte {error.start} is 0x{error.object[error.start]:02x}); convert or remove it"
        ) from None
    if "\0" in text:
        raise ConfigError(f"{path} is no text, as it holds zero bytes; remove it")
    return text
