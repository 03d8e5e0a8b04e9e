"""The shell of a report: one self-contained HTML page, responsive, light and dark, no external resource.

Blocks are HTML text; every helper here escapes what it is given. Charts come from `unshot.report.charts`.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape

STYLE = """
:root{--bg:#fff;--panel:#f6f7f9;--ink:#1a1d21;--soft:#5b6470;--line:#d9dde3;--grid:#e8ebef;--accent:#1d5fc2;
--good:#14713d;--goodbg:#e5f5eb;--bad:#a82020;--badbg:#fdeaea;--warn:#8a5a00;--warnbg:#fdf3dd;
--c1:#1f6fd6;--c2:#d4581c;--c3:#178a63;--c4:#8a4fd0;--c5:#b5830b;--c6:#c2286e;--c7:#0d7f99;--c8:#6b7480}
@media (prefers-color-scheme:dark){:root{--bg:#14171b;--panel:#1c2026;--ink:#e7eaee;--soft:#a0a9b5;--line:#343b45;
--grid:#272d35;--accent:#7fb1ff;--good:#6fd59a;--goodbg:#14301f;--bad:#ff8f8f;--badbg:#3a1919;--warn:#f0c061;
--warnbg:#352a10;--c1:#6aa8ff;--c2:#ff9560;--c3:#4fcf9f;--c4:#bd93ff;--c5:#e6bd4d;--c6:#ff7fb2;--c7:#4dc7e3;--c8:#a3acb8}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;
-webkit-text-size-adjust:100%}
main{max-width:1120px;margin:0 auto;padding:24px 20px 48px}
h1{font-size:1.65rem;line-height:1.2;margin:.2rem 0 .3rem;text-wrap:balance}
h2{font-size:1.2rem;margin:2.2rem 0 .6rem;padding-top:.6rem;border-top:1px solid var(--line)}
h3{font-size:1rem;margin:1.2rem 0 .4rem}
p{margin:.4rem 0;max-width:75ch}
.sub,.small{color:var(--soft)}.small{font-size:.85rem}
a{color:var(--accent)}code{font:.9em ui-monospace,Consolas,monospace;background:var(--panel);padding:.05em .3em;
border-radius:3px;overflow-wrap:anywhere}
.verdict{border-left:5px solid var(--line);background:var(--panel);padding:.8rem 1rem;margin:1rem 0;border-radius:4px}
.verdict b{display:block;font-size:1.15rem;line-height:1.3}
.verdict ul{margin:.4rem 0 0;padding-left:1.2rem}.verdict li,li{overflow-wrap:anywhere}
.good{border-color:var(--good);background:var(--goodbg)}.good b{color:var(--good)}
.bad{border-color:var(--bad);background:var(--badbg)}.bad b{color:var(--bad)}
.warn{border-color:var(--warn);background:var(--warnbg)}.warn b{color:var(--warn)}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(165px,1fr));gap:10px;margin:1rem 0}
.card{background:var(--panel);border:1px solid var(--line);border-radius:6px;padding:.7rem .8rem}
.card .k{color:var(--soft);font-size:.85rem}.card .v{font-size:1.35rem;font-weight:650;line-height:1.25;
font-variant-numeric:tabular-nums}.card .d{color:var(--soft);font-size:.82rem}
.scroll{overflow-x:auto;margin:.6rem 0;border:1px solid var(--line);border-radius:6px}
table{border-collapse:collapse;width:100%;font-size:.88rem;font-variant-numeric:tabular-nums}
.caption{font-weight:600;margin:.9rem 0 .3rem}
th,td{padding:.4rem .55rem;text-align:left;vertical-align:top;border-bottom:1px solid var(--grid)}
th{color:var(--soft);font-weight:600;background:var(--panel);vertical-align:bottom}
td:first-child{min-width:13rem;overflow-wrap:anywhere}td.w{min-width:15rem}
tr:last-child td{border-bottom:0}
.r{text-align:right}td.r{white-space:nowrap}
tr.strong td{font-weight:650;background:var(--panel)}
tr.faint td{color:var(--soft)}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,430px),1fr));gap:16px;align-items:start}
.charts>div{min-width:0}
figure{margin:0;border:1px solid var(--line);border-radius:6px;padding:.7rem .8rem;min-width:0}
figcaption{font-weight:600;margin-bottom:.3rem}
figure svg{width:100%;max-width:600px;height:auto;display:block}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:.15rem .9rem;margin:0 0 .3rem;padding:0;font-size:.82rem;
color:var(--soft)}.legend li{display:flex;align-items:center;gap:.35rem}
.legend svg{width:26px;height:10px;flex:none}
svg text{font-size:12px;fill:var(--ink);font-family:inherit}
svg .tick,svg .axislabel{fill:var(--soft)}svg .tick{font-size:11px}
svg .end{text-anchor:end}svg .middle{text-anchor:middle}
svg .value{font-size:11.5px}svg .marklabel{font-size:11.5px;font-weight:600}
svg .marklabel,svg .inside,svg .label{paint-order:stroke;stroke:var(--bg);stroke-width:3.5px;stroke-linejoin:round}
svg .grid{stroke:var(--grid);fill:none}svg .axis{stroke:var(--soft);fill:none}
svg .mark{stroke:var(--ink);stroke-width:1.4;stroke-dasharray:5 3;fill:none}
svg .whisker{stroke:var(--ink);stroke-width:1.4;fill:none}
svg .line{fill:none;stroke-width:2.2;stroke-linejoin:round}svg .line.muted{opacity:.55;stroke-width:1.6}
svg .band{stroke:none;opacity:.16}
.form{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:8px 14px;align-items:end}
.form label{font-size:.85rem;color:var(--soft);display:block}
.form input,.form button{display:block;width:100%;font:inherit;padding:.3rem .4rem;border:1px solid var(--line);
border-radius:4px;background:var(--bg);color:var(--ink)}
details{margin:.8rem 0}summary{cursor:pointer;color:var(--accent)}
dl{display:grid;grid-template-columns:minmax(9rem,max-content) 1fr;gap:.25rem 1rem;margin:.6rem 0;font-size:.9rem}
dt{color:var(--soft)}dd{margin:0;overflow-wrap:anywhere}
footer{margin-top:2.5rem;color:var(--soft);font-size:.85rem;border-top:1px solid var(--line);padding-top:.8rem}
@media (max-width:600px){main{padding:16px 14px 32px}h1{font-size:1.35rem}dl{grid-template-columns:1fr;gap:0}
dd{margin-bottom:.5rem}th,td{padding:.35rem .5rem}td:first-child{min-width:8.5rem}figure{padding:.6rem .5rem}}
@media print{.scroll{overflow:visible}figure,.card{break-inside:avoid}}
"""
COLOURS = "".join(
    f"svg .s{n}{{fill:var(--c{n})}}svg .line.s{n}{{stroke:var(--c{n});fill:none}}" for n in range(1, 9)
)


def page(title: str, *blocks: str, subtitle: str = "", footer: str = "", script: str = "") -> str:
    """The whole document. `blocks` are HTML; `title`, `subtitle` and `footer` are plain text.

    `script` is the page's own JavaScript, the only one that its security policy lets run.
    """
    sub = f'<p class="sub">{escape(subtitle)}</p>' if subtitle else ""
    foot = f"<footer>{escape(footer)}</footer>" if footer else ""
    policy, code = "default-src 'none'; style-src 'unsafe-inline'", ""
    if script:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        policy, code = f"{policy}; script-src 'sha256-{digest}'", f"<script>{script}</script>"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        # Nothing may be loaded from anywhere: a report is one file.
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        f"<title>{escape(title)}</title><style>{STYLE}{COLOURS}</style></head>\n"
        f"<body><main><h1>{escape(title)}</h1>{sub}\n"
        + "\n".join(blocks)
        + f"\n{foot}</main>{code}</body></html>\n"
    )


def section(heading: str, *blocks: str) -> str:
    """A part of the page under a heading."""
    return f"<section><h2>{escape(heading)}</h2>\n" + "\n".join(blocks) + "</section>"


def text(content: str, *, small: bool = False) -> str:
    """A paragraph."""
    style = ' class="small"' if small else ""
    return f"<p{style}>{escape(content)}</p>"


def bullets(items: Iterable[str], *, linked: bool = False) -> str:
    """A list; `linked` makes addresses of pages in its texts links."""
    shown = (linkify(escape(item)) if linked else escape(item) for item in items)
    return "<ul>" + "".join(f"<li>{item}</li>" for item in shown) + "</ul>"


# A host by its usual endings and a path, or a host alone that ends in none of a file's endings.
_ADDRESS = re.compile(
    r"(?<![\w/.@-])(?:https?://)?((?:[a-z0-9-]+\.)+(?:com|org|dev|net|ai|lk|li|fail|xyz|top|inc)(?:/[^\s,;()]*[^\s,;().:])?)"
)


def linkify(escaped: str) -> str:
    """Escaped text with its web addresses as links."""
    return _ADDRESS.sub(lambda m: f'<a href="https://{m[1]}" rel="noreferrer">{m[0]}</a>', escaped)


def verdict(headline: str, details: Sequence[str] = (), *, kind: str = "") -> str:
    """The answer in one line with its reasons; `kind` is `good`, `bad`, `warn` or nothing."""
    points = bullets(details) if details else ""
    return f'<div class="verdict {kind}"><b>{escape(headline)}</b>{points}</div>'


def cards(items: Sequence[tuple[str, str, str]]) -> str:
    """Headline figures: (what, value, detail)."""
    inner = "".join(
        f'<div class="card"><div class="k">{escape(k)}</div><div class="v">{escape(v)}</div>'
        f'<div class="d">{escape(d)}</div></div>'
        for k, v, d in items
    )
    return f'<div class="cards">{inner}</div>'


def table(
    headers: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    caption: str = "",
    left: Sequence[int] = (0,),
    strong: Sequence[int] = (),
    faint: Sequence[int] = (),
) -> str:
    """A table that scrolls sideways on a narrow screen; columns in `left` are text, the others numbers.

    `strong` and `faint` are row numbers to set off.
    """

    # Text columns with sentences in them get room.
    wide = {c for c in left if c and any(len(row[c]) > 30 for row in rows)}

    def cell(tag: str, value: str, column: int) -> str:
        style = ' class="w"' if column in wide else "" if column in left else ' class="r"'
        return f"<{tag}{style}>{escape(value)}</{tag}>"

    head = "".join(cell("th", h, i) for i, h in enumerate(headers))
    body = ""
    for number, row in enumerate(rows):
        style = (
            ' class="strong"' if number in set(strong) else ' class="faint"' if number in set(faint) else ""
        )
        body += f"<tr{style}>" + "".join(cell("td", v, i) for i, v in enumerate(row)) + "</tr>"
    title = f'<p class="caption">{escape(caption)}</p>' if caption else ""
    inner = (f"<thead><tr>{head}</tr></thead>" if any(headers) else "") + f"<tbody>{body}</tbody>"
    return f'{title}<div class="scroll"><table>{inner}</table></div>'


def facts(items: Mapping[str, str]) -> str:
    """Names and values, e.g. the configuration."""
    return "<dl>" + "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in items.items()) + "</dl>"


def links(items: Mapping[str, str]) -> str:
    """Names and the files beside this page that they lead to."""
    rows = (f'<li><a href="{escape(to)}">{escape(name)}</a></li>' for name, to in items.items())
    return f"<ul>{''.join(rows)}</ul>"


def charts(*figures: str) -> str:
    """Figures or tables side by side where the screen is wide enough; a table's caption stays above it."""
    return f'<div class="charts">{"".join(f"<div>{figure}</div>" for figure in figures)}</div>'


def details(summary: str, *blocks: str) -> str:
    """A part that is folded until asked for."""
    return f"<details><summary>{escape(summary)}</summary>" + "\n".join(blocks) + "</details>"
