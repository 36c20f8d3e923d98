"""The page as one self-contained HTML file: the code of the tab and the data of some runs, nothing from elsewhere."""

from __future__ import annotations

import base64
import functools
import hashlib
import html
import importlib.resources
import re

_IMPORT = re.compile(r'^import \{[^}]*\} from "\./([a-z]+\.js)";\n', re.MULTILINE)
_EXPORT = re.compile(r"^export (?=async function|function|class|const)", re.MULTILINE)
_BEGIN = 'await new App(document.body, await Embedded.read(document.getElementById("data").textContent)).start();\n'


def _read(name: str) -> str:
    return importlib.resources.files(__package__).joinpath("web", name).read_text(encoding="utf-8")


@functools.cache
def bundle(*roots: str) -> str:
    """Modules of the page as one, each after those that it imports; nothing is exported but by the last.

    Args:
        roots: The modules that are wanted, with all that they import.

    Example:
        >>> [line for line in bundle("index.js").splitlines() if line.startswith(("import ", "export "))]
        ['export async function render() {']
    """
    parts: dict[str, str] = {}

    def add(name: str, above: tuple[str, ...]) -> None:
        if name in parts or name in above:  # of two that import each other, the one met first comes last
            return
        source = _read(name)
        for imported in _IMPORT.findall(source):
            add(imported, (*above, name))
        code = _IMPORT.sub("", source)
        parts[name] = code if name == roots[-1] else _EXPORT.sub("", code)

    for root in roots:
        add(root, ())
    return "".join(parts.values())


def script() -> str:
    """The code of a page that carries its data.

    Example:
        >>> script().splitlines()[-1][-9:]
        '.start();'
    """
    return _EXPORT.sub("", bundle("file.js", "app.js")) + _BEGIN


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def document(payload: bytes, title: str) -> str:
    """A page that opens from disk, in sandboxed frames and as `srcdoc`; it fetches nothing and runs nothing else.

    Args:
        payload: The data, see `lightning_gradhealth.view.payload`.
        title: Its title.

    Example:
        >>> page = document(b"", "a <run>")
        >>> "<title>a &lt;run&gt;</title>" in page, page.count("http:"), page.count("https:")
        (True, 0, 0)
    """
    code, style = script(), _read("style.css")
    policy = (
        f"default-src 'none'; script-src {_hash(code)}; style-src {_hash(style)}; img-src data: blob:;"
        " base-uri 'none'; form-action 'none'"
    )
    data = base64.b64encode(payload).decode("ascii")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f"<title>{html.escape(title)}</title>\n<style>{style}</style>\n</head>\n<body>\n"
        f'<script type="application/octet-stream" id="data">{data}</script>\n'
        f'<script type="module">{code}</script>\n</body>\n</html>\n'
    )


def shell() -> tuple[str, str]:
    """A page that asks the server that it comes from for its code and its data, and the policy that goes with it.

    Example:
        >>> page, policy = shell()
        >>> "index.js" in page, policy.split("; ")[0]
        (True, "default-src 'none'")
    """
    code = 'import { render } from "./index.js";\nawait render();\n'
    policy = (
        f"default-src 'none'; script-src 'self' {_hash(code)}; style-src 'self'; connect-src 'self';"
        " img-src data: blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    head = '<meta charset="utf-8">\n<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    icon = '<link rel="icon" href="data:,">\n'
    page = f'<!doctype html>\n<html lang="en">\n<head>\n{head}{icon}<title>Grad Health</title>\n</head>\n<body>\n'
    return f'{page}<script type="module">{code}</script>\n</body>\n</html>\n', policy


def frame(page: str, height: int = 900) -> str:
    """A page within another, as a notebook shows it: a frame that cannot reach what is around it.

    Args:
        page: What `document` gave.
        height: In pixels.

    Example:
        >>> frame('<p title="x">').startswith('<iframe sandbox="allow-scripts allow-downloads"')
        True
    """
    return (
        f'<iframe sandbox="allow-scripts allow-downloads" style="width:100%;height:{height}px;border:0"'
        f' title="Training health" srcdoc="{html.escape(page)}"></iframe>'
    )
