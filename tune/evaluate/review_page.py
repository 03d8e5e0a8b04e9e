"""The review sheet as one HTML file: no network, answers kept in the browser, exported as CSV."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape

from unshot.report import page

STYLE = """<style>
.item{border:1px solid var(--line);border-radius:6px;padding:.8rem .9rem;margin:1rem 0}
.item.done{border-color:var(--good)}
.item h2{border:0;padding:0;margin:0 0 .4rem;font-size:1rem;color:var(--soft)}
.quote{white-space:pre-wrap;overflow-wrap:anywhere;background:var(--panel);
border-radius:4px;padding:.5rem .7rem;margin:.3rem 0}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,300px),1fr));gap:.8rem;margin-top:.5rem}
fieldset{border:0;padding:0;margin:.4rem 0;display:flex;flex-wrap:wrap;gap:.2rem 1rem;align-items:center}
legend{float:left;padding:0;margin-right:.8rem;color:var(--soft)}
label{display:inline-flex;gap:.35rem;align-items:center;min-height:2rem;cursor:pointer}
textarea{width:100%;font:inherit;color:inherit;background:var(--bg);
border:1px solid var(--line);border-radius:4px;padding:.3rem .5rem}
.bar{position:sticky;top:0;background:var(--bg);border-bottom:1px solid var(--line);padding:.5rem 0;
display:flex;gap:1rem;align-items:center;flex-wrap:wrap;z-index:1}
button{font:inherit;padding:.4rem .9rem;border-radius:5px;border:1px solid var(--accent);
background:var(--accent);color:var(--bg);cursor:pointer}
</style>"""
SCRIPT = """"use strict";
const sheet=JSON.parse(document.getElementById("sheet").textContent),store="unshot-review-"+sheet.rows[0].id;
const asked=r=>r.answer_2===""?["ok_1"]:["ok_1","ok_2","better"];
let given={};try{given=JSON.parse(localStorage.getItem(store))||{}}catch(e){}
function save(){try{localStorage.setItem(store,JSON.stringify(given))}catch(e){}show()}
function show(){let n=0;for(const r of sheet.rows){const g=given[r.id]||{},d=asked(r).every(k=>g[k]);n+=d;
document.getElementById(r.id).classList.toggle("done",d)}
document.getElementById("count").textContent=n+" of "+sheet.rows.length+" done"}
for(const e of document.querySelectorAll("[data-id]")){const g=given[e.dataset.id]||{},k=e.dataset.key;
if(e.type==="radio")e.checked=g[k]===e.value;else e.value=g[k]||"";
e.addEventListener("input",()=>{(given[e.dataset.id]=given[e.dataset.id]||{})[k]=e.value;save()})}
const plain=v=>/^\\s*[=+@|%\uff1d\uff0b\uff0d\uff20-]/.test(v)?"'"+v:v;
const cell=v=>'"'+plain(String(v??"")).replaceAll('"','""')+'"';
document.getElementById("export").addEventListener("click",()=>{
const row=r=>sheet.columns.map(c=>cell((given[r.id]||{})[c]??r[c])).join(",");
const text="\\ufeff"+[sheet.columns.join(","),...sheet.rows.map(row)].join("\\r\\n")+"\\r\\n";
const a=document.createElement("a");a.href=URL.createObjectURL(new Blob([text],{type:"text/csv"}));
a.download=sheet.name+".csv";document.body.appendChild(a);a.click();a.remove()});
show();
"""


def review_page(sheet: Sequence[dict[str, str]], instruction: str | None) -> str:
    """The page for a drawn sheet. Choices stay in the browser (where it allows that) until they are exported."""
    columns = list(sheet[0])
    name = sheet[0]["id"].rsplit("-", 1)[0]
    data = {
        "name": f"review-{name}",
        "columns": columns,
        "rows": list(sheet),
    }
    blocks = [
        STYLE,
        page.text(
            "For each request say whether the answer would be acceptable to you, and where there are two answers "
            "which is better. The order of the answers is random. When you are done, export the CSV and hand it back; "
            "nothing leaves this page otherwise."
        ),
    ]
    if instruction:
        blocks.append(page.text(f"The task: {instruction}"))
    blocks.append(
        '<div class="bar"><span id="count"></span><button id="export" type="button">Export CSV</button></div>'
    )
    blocks += [_item(number, row) for number, row in enumerate(sheet, start=1)]
    # "</" would end the script element inside the data.
    raw = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")
    blocks += [f'<script type="application/json" id="sheet">{raw}</script>']
    return page.page(f"Review {name}", *blocks, subtitle=f"{len(sheet)} rows, blinded", script=SCRIPT)


def _item(number: int, row: dict[str, str]) -> str:
    answers = [n for n in ("1", "2") if n == "1" or row["answer_2"]]
    inner = "".join(
        f"<div><b>Answer {n}</b>{_quote(row[f'answer_{n}'])}"
        + _choice(row["id"], f"ok_{n}", "Acceptable?", (("yes", "yes"), ("no", "no")))
        + "</div>"
        for n in answers
    )
    better = ""
    if len(answers) == 2:
        options = (("1", "answer 1"), ("2", "answer 2"), ("tie", "equally good"))
        better = _choice(row["id"], "better", "Better:", options)
    return (
        f'<section class="item" id="{escape(row["id"])}"><h2>{number}</h2>{_quote(row["request"])}'
        f'<div class="pair">{inner}</div>{better}'
        f'<textarea rows="1" data-id="{escape(row["id"])}" data-key="comment" placeholder="comment" '
        'aria-label="comment"></textarea></section>'
    )


def _quote(text: str) -> str:
    return f'<div class="quote">{escape(text)}</div>'


def _choice(item: str, key: str, question: str, options: Sequence[tuple[str, str]]) -> str:
    inner = "".join(
        f'<label><input type="radio" name="{escape(item)}-{key}" data-id="{escape(item)}" data-key="{key}" '
        f'value="{value}"> {escape(word)}</label>'
        for value, word in options
    )
    return f"<fieldset><legend>{escape(question)}</legend>{inner}</fieldset>"
