"""The look of a report: its style sheet for light and dark, wide and narrow,
and the few lines that sort a table and say that it goes on to the right."""

STYLE = """
:root { color-scheme: light dark; --paper: #fbfaf7; --card: #ffffff; --ink: #1d2126; --muted: #5d6672;
  --line: #dcdfe3;
  --accent: #9a4a12; --mark: #fff3dc; --bar: #c9752f; --code: #f1efe9; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171b; --card: #1b1f25; --ink: #e6e8eb;
  --muted: #9aa4b1;
  --line: #333a44; --accent: #f0a35e; --mark: #33291a; --bar: #e08d45; --code: #22272e; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1340px; margin: 0 auto; padding: 28px 24px 64px; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .3em; letter-spacing: -.01em; }
h2 { font-size: 1.3rem; margin: 2.2em 0 .5em; padding-top: .7em; border-top: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 1.6em 0 .4em; }
p, ul { max-width: 46em; margin: .5em 0; overflow-wrap: anywhere; }
a { color: var(--accent); }
.lead { font-size: 1.1rem; color: var(--muted); }
.note, figcaption, .small { color: var(--muted); font-size: .88rem; }
nav { font-size: .92rem; margin: 1em 0; display: flex; flex-wrap: wrap; gap: .3em 1.2em; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 10px;
  margin: 1.2em 0; }
.facts div { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .6em .8em; }
.facts b { display: block; font-size: 1.15rem; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
.facts span { color: var(--muted); font-size: .82rem; }
figure { margin: 1.2em 0; }
figure img.plot { width: 100%; height: auto; display: block; border: 1px solid var(--line);
  border-radius: 8px; }
.scroll { overflow-x: auto; background: var(--card); border: 1px solid var(--line); border-radius: 8px; }
.frame { position: relative; }
.frame.more::after { content: ""; position: absolute; inset: 1px 1px 1px auto; width: 40px; z-index: 3;
  pointer-events: none; background: linear-gradient(to right, transparent, var(--card)); }
.frame.more:has(.tall)::after { right: 16px; }
.frame.more + figcaption::before { content: "Scroll sideways for more. "; }
.tall { max-height: 78vh; overflow-y: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
.data { width: 100%; }
.data th, .data td { padding: .38em .5em; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
.data th { white-space: normal; vertical-align: bottom; line-height: 1.25; }
.data td.text, .data th.text { text-align: left; }
.data thead th { position: sticky; top: 0; background: var(--card); z-index: 2;
  box-shadow: 0 1px 0 var(--line); }
.data th button { all: unset; cursor: pointer; font-weight: 600; }
.data th button:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
.data th[aria-sort=ascending] button::after { content: " \\2191"; }
.data th[aria-sort=descending] button::after { content: " \\2193"; }
.data td.name { position: sticky; left: 0; background: var(--card); z-index: 1; white-space: normal;
  overflow-wrap: anywhere; min-width: 9em; }
.data td.words { white-space: normal; max-width: 22em; }
.data tr.marked td { background: var(--mark); }
.data tr.parent td { font-weight: 600; }
.data tbody tr:last-child td { border-bottom: 0; }
.ends { color: var(--muted); font-size: .84em; display: block; line-height: 1.2; }
.span { display: block; position: relative; height: 4px; margin-top: 2px; background: var(--line);
  border-radius: 2px; }
.span i { position: absolute; top: 0; bottom: 0; background: var(--bar); opacity: .55; border-radius: 2px;
  min-width: 2px; }
.span u { position: absolute; top: -2px; bottom: -2px; width: 2px; margin-left: -1px;
  background: var(--ink); }
svg.curve { display: block; color: var(--bar); }
.sheet table { border-spacing: 0; table-layout: fixed; width: 100%; }
.sheet thead th:first-child { width: 170px; }
.sheet th { font-weight: 500; font-size: .78rem; line-height: 1.25; color: var(--muted); padding: 6px 4px; }
.sheet thead th { text-align: center; vertical-align: bottom; overflow-wrap: anywhere; }
.sheet tbody th { text-align: left; vertical-align: middle; position: sticky; left: 0; z-index: 1;
  background: var(--card); padding-left: 10px; }
.sheet td { padding: 2px; }
.sheet img { display: block; width: 100%; height: auto; border-radius: 3px; }
.sheet th.parent { color: var(--ink); font-weight: 700; }
dl { display: grid; grid-template-columns: minmax(110px, 190px) 1fr; gap: .25em 1em; font-size: .92rem;
  max-width: 70em; }
dt { color: var(--muted); } dd { margin: 0; overflow-wrap: anywhere; }
pre { background: var(--code); padding: .8em 1em; border-radius: 8px; overflow-x: auto; font-size: .84rem;
  line-height: 1.45; white-space: pre-wrap; overflow-wrap: anywhere; }
code { background: var(--code); padding: .1em .3em; border-radius: 4px; font-size: .9em;
  overflow-wrap: anywhere; }
pre code { padding: 0; background: none; }
details { margin: .8em 0; } summary { cursor: pointer; color: var(--accent); }
footer { margin-top: 3em; color: var(--muted); font-size: .85rem; }
@media (max-width: 1300px) { .data { font-size: .84rem; } .data th, .data td { padding: .35em .38em; } }
@media (max-width: 600px) { main { padding: 18px 12px 48px; } h1 { font-size: 1.45rem;
  } .data { font-size: .82rem; }
  .data th, .data td { padding: .35em .45em; } dl { grid-template-columns: 1fr; gap: 0;
  } dd { margin-bottom: .5em; }
  .sheet thead th:first-child { width: 100px; }
  .sheet th { font-size: .7rem; } .facts { grid-template-columns: 1fr 1fr; } }
@media print { .tall { max-height: none; } .scroll { overflow: visible; } }
"""

SORTING = """
document.querySelectorAll('.frame').forEach(function (frame) {
  var box = frame.firstElementChild;
  function look() { frame.classList.toggle('more', box.scrollLeft + box.clientWidth < box.scrollWidth - 2); }
  box.addEventListener('scroll', look);
  new ResizeObserver(look).observe(box);
});
document.querySelectorAll('table.data').forEach(function (table) {
  table.querySelectorAll('thead th').forEach(function (head, column) {
    head.querySelector('button').addEventListener('click', function () {
      var falling = head.getAttribute('aria-sort') !== 'descending', body = table.tBodies[0];
      var rows = Array.from(body.rows).map(function (row, at) {
        var cell = row.cells[column].dataset.v;
  return [cell === '' ? null : isNaN(cell) ? cell : +cell, at, row]; });
      rows.sort(function (x, y) {
        if (x[0] === null || y[0] === null) return (x[0] === null) - (y[0] === null) || x[1] - y[1];
        var less = typeof x[0] === typeof y[0] ? x[0] < y[0] : String(x[0]) < String(y[0]);
        return x[0] === y[0] ? x[1] - y[1] : less === falling ? 1 : -1; });
      rows.forEach(function (row) { body.appendChild(row[2]); });
      table.querySelectorAll('th[aria-sort]').forEach(function (th) { th.removeAttribute('aria-sort'); });
      head.setAttribute('aria-sort', falling ? 'descending' : 'ascending');
    });
  });
});
"""
