"""Questions about the Python standard library, answered by its own docstrings.

Made from the running interpreter: a fixed list of modules is imported and walked, so the data needs no download and
is the same wherever the same Python version runs. Modules that act on import (open a window, a browser, a socket) are
not on the list.
"""

import dataclasses
import hashlib
import importlib
import inspect
import json
import re
import subprocess
import sys
import types
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

_MODULES: Final = """
abc argparse array ast asyncio base64 bdb binascii bisect builtins bz2 calendar cmath cmd code codecs codeop collections
collections.abc colorsys compileall concurrent.futures configparser contextlib contextvars copy copyreg csv dataclasses
datetime decimal difflib dis doctest email email.message email.policy email.utils enum errno fileinput filecmp fnmatch
fractions ftplib functools gc getopt getpass gettext glob graphlib gzip hashlib heapq hmac html html.parser http.client
http.cookiejar http.cookies http.server imaplib importlib.abc importlib.metadata importlib.resources importlib.util
inspect io ipaddress itertools json json.decoder json.encoder keyword linecache locale logging logging.config
logging.handlers lzma mailbox marshal math mimetypes modulefinder multiprocessing.pool netrc ntpath numbers opcode
operator optparse os pathlib pdb pickle pickletools pkgutil platform plistlib poplib posixpath pprint profile pstats
pyclbr pydoc queue quopri random re reprlib runpy sched secrets select selectors shelve shlex shutil signal site smtplib
socket socketserver sqlite3 ssl stat statistics string stringprep struct subprocess symtable sys sysconfig tabnanny
tarfile tempfile textwrap threading time timeit token tokenize trace traceback tracemalloc types typing unicodedata
unittest unittest.mock urllib.error urllib.parse urllib.request urllib.robotparser uuid warnings wave weakref webbrowser
wsgiref.headers wsgiref.simple_server wsgiref.util xml.dom.minidom xml.etree.ElementTree xml.sax.handler
xml.sax.saxutils xmlrpc.client zipapp zipfile zipimport zlib zoneinfo
"""

_MAX_ANSWER: Final = 1000
_MIN_ANSWER: Final = 24
_MAX_ARGUMENTS: Final = 6
_TEMPLATES: Final[dict[str, tuple[str, ...]]] = {
    "function": (
        "What does `{call}` do?",
        "Explain `{call}` from the Python standard library.",
        "What is `{call}` for in Python?",
    ),
    "method": (
        "What does the method `{call}` do?",
        "In Python, what happens when I call `{call}`?",
        "Explain `{call}`.",
    ),
    "class": (
        "What is the class `{call}` for?",
        "What does an object of `{name}` represent in Python?",
        "Explain Python's `{call}`.",
    ),
    "module": ("What is the Python module `{name}` for?",),
}


@dataclass(frozen=True)
class Question:
    """One question and its answer.

    Attributes:
        name: Qualified name of what is asked about, such as "textwrap.dedent"; the held-out split goes by it.
        prompt: The question.
        completion: The docstring, cleaned and cut at a paragraph.
    """

    name: str
    prompt: str
    completion: str


def stdlib_questions() -> list[Question]:
    """All questions of this interpreter, in a stable order, without two equal answers.

    Asked in a fresh process: libraries that are already imported here replace functions of the standard library
    (torch those of `inspect`), and the data would depend on them.
    """
    # -I and -S: neither the environment nor site-packages have a say.
    done = subprocess.run([sys.executable, "-I", "-S", __file__], check=True, capture_output=True, encoding="utf-8")
    return [Question(*fields) for fields in json.loads(done.stdout)]


def collect_questions() -> list[Question]:
    """The questions as this process sees the standard library."""
    questions: list[Question] = []
    names: set[str] = set()
    answers: set[str] = set()
    for module_name in _MODULES.split():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # A module on its way out still has docstrings.
                module = importlib.import_module(module_name)
        except ImportError:
            continue  # Not built into this interpreter (no sqlite3, no ssl), or gone in its version.
        for name, kind, item in _documented(module_name, module):
            answer = clean_answer(item.__doc__)
            if name in names or answer in answers or len(answer) < _MIN_ANSWER:
                continue
            names.add(name)
            answers.add(answer)
            questions.append(Question(name, _ask(name, kind, item), answer))
    return questions


def clean_answer(doc: str) -> str:
    """The first paragraphs of a docstring, at most about a thousand characters, ending at a paragraph or sentence."""
    paragraphs = [p.rstrip() for p in re.split(r"\n\s*\n", inspect.cleandoc(doc)) if p.strip()]
    kept: list[str] = []
    size = 0
    for paragraph in paragraphs:
        if kept and size + len(paragraph) > _MAX_ANSWER:
            break
        kept.append(paragraph)
        size += len(paragraph) + 2
    text = "\n\n".join(kept)
    if len(text) > _MAX_ANSWER:
        end = text.rfind(". ", 0, _MAX_ANSWER)
        text = text[: end + 1] if end > 0 else text[:_MAX_ANSWER].rsplit(None, 1)[0]
    return text


def _documented(module_name: str, module: types.ModuleType) -> Iterator[tuple[str, str, Any]]:
    """Qualified name, kind and object of everything public in `module` that has a docstring of its own."""
    if module.__doc__:
        yield module_name, "module", module
    public = getattr(module, "__all__", None) or [name for name in vars(module) if not name.startswith("_")]
    for name in sorted(set(public)):
        item = vars(module).get(name)
        if item is None or isinstance(item, types.ModuleType) or not _is_home(module_name, item):
            continue
        if isinstance(item, type):
            if isinstance(item.__dict__.get("__doc__"), str):
                yield f"{module_name}.{name}", "class", item
            for member_name, member in sorted(vars(item).items()):
                if not member_name.startswith("_") and _is_callable_with_doc(member):
                    yield f"{module_name}.{name}.{member_name}", "method", member
        elif _is_callable_with_doc(item):
            yield f"{module_name}.{name}", "function", item


def _is_callable_with_doc(item: Any) -> bool:
    kinds = (types.FunctionType, types.BuiltinFunctionType, types.MethodDescriptorType, classmethod, staticmethod)
    return isinstance(item, kinds) and isinstance(item.__doc__, str)


def _is_home(module_name: str, item: Any) -> bool:
    """False for what `module` only imports from elsewhere; its C half (`_bisect` for `bisect`) is no elsewhere."""
    home = getattr(item, "__module__", None)
    if not isinstance(home, str):
        return True
    package = module_name.partition(".")[0]
    return home.lstrip("_").partition(".")[0] == package or home.startswith("_") or home == "posix"


def _ask(name: str, kind: str, item: Any) -> str:
    # Python salts its own hash of a string anew in every process.
    templates = _TEMPLATES[kind]
    template = templates[hashlib.sha256(name.encode()).digest()[0] % len(templates)]
    return template.format(name=name, call=_call(name, item))


def _call(name: str, item: Any) -> str:
    name = name.removeprefix("builtins.")
    if isinstance(item, types.ModuleType):
        return name
    try:
        parameters = inspect.signature(getattr(item, "__func__", item)).parameters
    except (TypeError, ValueError):
        return name  # Some built-in functions do not tell their arguments.
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    shown = [stars.get(p.kind, "") + p.name for p in parameters.values() if p.name not in ("self", "cls", "$self")]
    return f"{name}({', '.join(shown)})" if len(shown) <= _MAX_ARGUMENTS else name


if __name__ == "__main__":
    json.dump([dataclasses.astuple(question) for question in collect_questions()], sys.stdout)
