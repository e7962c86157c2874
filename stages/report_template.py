"""The report's page as a jinja2 template: one offline file, light or dark as the reader's system is."""

STYLE = """
:root { --page: #fbfbfa; --card: #fff; --ink: #1d2126; --soft: #626b75; --line: #e2e4e7;
        --good: #1b7f4d; --bad: #b3303f; --even: #626b75; --tint: #f1f3f5; --link: #2467a4; }
@media (prefers-color-scheme: dark) {
  :root { --page: #15181c; --card: #1c2025; --ink: #e4e7ea; --soft: #98a1ab; --line: #2e343b;
          --good: #5fc692; --bad: #f0808c; --even: #98a1ab; --tint: #23282e; --link: #76b3ea; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
       font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 40px 24px 80px; }
h1 { font-size: 28px; line-height: 1.2; margin: 0 0 6px; letter-spacing: -.01em; }
h2 { font-size: 19px; margin: 48px 0 6px; letter-spacing: -.005em; }
h3 { font-size: 15px; margin: 26px 0 8px; }
p { margin: 6px 0 12px; max-width: 76ch; }
.lead, .note, figcaption { color: var(--soft); }
.note, figcaption { font-size: 13px; max-width: 92ch; }
code { font: 12.5px/1.4 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 14px 16px;
        margin: 12px 0; overflow-x: auto; }
table { border-collapse: collapse; font-size: 13.5px; font-variant-numeric: tabular-nums; width: 100%; }
th { text-align: left; font-weight: 600; color: var(--soft); font-size: 12.5px; vertical-align: bottom; }
th, td { padding: 6px 10px; border-bottom: 1px solid var(--line); white-space: nowrap; }
td { vertical-align: top; }
tr:last-child td { border-bottom: 0; }
tr.head td { background: var(--tint); font-weight: 600; font-size: 12.5px; }
tr.main td:first-child { font-weight: 650; }
td small { display: block; color: var(--soft); font-size: 11.5px; line-height: 1.45; }
.wrap { white-space: normal; overflow-wrap: anywhere; }
.verdict th, .verdict td { padding: 6px 7px; } .verdict th, .verdict td:last-child { white-space: normal; }
.good, td small.good { color: var(--good); } .bad, td small.bad { color: var(--bad); }
.even, td small.even { color: var(--even); }
.mark { font-weight: 700; }
.sheet td, .sheet th { border: 0; padding: 3px; text-align: center; }
.sheet { width: auto; }
.sheet td.prompt { text-align: left; white-space: normal; width: 150px; padding-right: 12px; vertical-align: middle;
                   font-size: 13px; }
.sheet th { min-width: 104px; }
.sheet img { display: block; margin: 0 auto; width: 96px; height: 96px; object-fit: contain; border-radius: 6px;
             background: var(--tint); }
.sheet .many { display: flex; gap: 3px; } .sheet .many img { width: 66px; height: 66px; }
.sheet .many { padding: 0 6px; }
figure { margin: 12px 0; } figure img { display: block; max-width: 100%; height: auto; margin: 0 auto; }
details { margin: 10px 0; } summary { cursor: pointer; color: var(--link); }
pre { background: var(--tint); border-radius: 8px; padding: 12px 14px; overflow-x: auto; font-size: 12px; }
@media print { .card { break-inside: avoid; } }
"""


def style(frames: int = 1) -> str:
    """The page's style; sheets of videos have room for strips of so many frames."""
    wide = f".sheet img {{ width: {96 * frames}px; }} .sheet .many img {{ width: {66 * frames}px; }}"
    return STYLE + (f"{wide} .sheet .many {{ flex-direction: column; }}\n" if frames > 1 else "")


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{{ title }}</title>
<style>{{ style }}</style>
</head>
<body>
<main>
{%- macro img(source, words) -%}<img src="{{ source }}" alt="{{ words }}" loading="lazy">{%- endmacro %}
{%- macro figure(plot) %}
<figure class="card">{{ img(plot.source, plot.caption) }}<figcaption>{{ plot.caption }}</figcaption></figure>
{%- endmacro %}
{%- macro cell(entry) -%}
{%- if entry %}{{ entry.value }}{% if entry.interval %}<small>{{ entry.interval }}</small>{% endif -%}
{% if entry.delta %}<small class="{{ entry.tone }}">{{ entry.delta }}</small>{% endif %}
{%- else %}<span class="even">–</span>{% endif -%}
{%- endmacro %}

<h1>{{ title }}</h1>
<p class="lead">{{ lead }}</p>

<h2>Does the few-step student hold its own?</h2>
<p class="note">{{ seen }} Same prompts and same noises for all.
{{ intervals }} A student that wins the reward it was trained on and loses the others does not count.</p>
<div class="card"><table class="verdict">
<tr><th>student</th>{% for column in claims.columns %}<th>{{ column }}</th>{% endfor %}</tr>
{% for row in claims.rows %}<tr class="{{ 'main' if row.main }}"><td>{{ row.name }}</td>
{% for claim in row.claims %}<td><span class="mark {{ claim.tone }}">{{ claim.mark }}</span> {{ claim.text }}
{% if claim.detail %}<small>{{ claim.detail }}</small>{% endif %}</td>{% endfor %}</tr>
{% endfor %}</table></div>

<h2>Teacher, untrained base, student</h2>
<p class="note">{{ sheets.note }}</p>
{% for sheet in sheets.pages %}
{% if not loop.first %}<details><summary>{{ sheet.title }}</summary>{% else %}<h3>{{ sheet.title }}</h3>{% endif %}
<div class="card"><table class="sheet">
<tr><th></th>{% for column in sheet.columns %}<th>{{ column.name }}<br>{{ column.cost }}</th>{% endfor %}</tr>
{% for row in sheet.rows %}<tr><td class="prompt">{{ row.prompt }}</td>
{% for picture in row.pictures %}<td>{{ img(picture.source, picture.words) }}</td>{% endfor %}</tr>
{% endfor %}</table></div>
{% if not loop.first %}</details>{% endif %}
{% endfor %}

{% if variety %}
<h2>Variety within a prompt</h2>
<p class="note">One prompt, several noises, the same noises in every column: a student that has collapsed draws one
picture again and again.</p>
<div class="card"><table class="sheet">
<tr><th></th>{% for column in variety.columns %}<th>{{ column.name }}, {{ column.cost }}</th>{% endfor %}</tr>
{% for row in variety.rows %}<tr><td class="prompt">{{ row.prompt }}</td>
{% for group in row.groups %}<td><div class="many">
{% for picture in group %}{{ img(picture.source, picture.words) }}{% endfor %}
</div></td>{% endfor %}</tr>
{% endfor %}</table></div>
{% endif %}

<h2>All systems, all metrics</h2>
<p class="note">Value, its 95 % interval, and the difference to the 50-step teacher with its interval (coloured where
that interval leaves out zero). {{ intervals }}</p>
<div class="card"><table>
<tr><th>system</th><th>evaluations</th>{% for metric in table.metrics %}
<th>{{ metric.name }}<br>{{ metric.role }} {{ metric.arrow }}</th>{% endfor %}</tr>
{% for group in table.groups %}
<tr class="head"><td colspan="{{ table.metrics | length + 2 }}">{{ group.name }}</td></tr>
{% for row in group.rows %}<tr class="{{ 'main' if row.main }}"><td>{{ row.name }}</td><td>{{ row.evaluations }}</td>
{% for entry in row.cells %}<td>{{ cell(entry) }}</td>{% endfor %}</tr>
{% endfor %}{% endfor %}</table></div>
{% for plot in forest %}{{ figure(plot) }}{% endfor %}

{% for block in comparisons %}
<h2>{{ block.title }}</h2>
<p class="note">{{ block.note }}</p>
<div class="card"><table>
<tr><th></th>{% for column in block.columns %}<th>{{ column }}</th>{% endfor %}</tr>
{% for row in block.rows %}<tr><td>{{ row.name }}</td>
{% for entry in row.cells %}<td>{% if entry %}<span class="{{ entry.tone }}">{{ entry.value }}</span>
<small>{{ entry.interval }}</small>{% else %}<span class="even">–</span>{% endif %}</td>{% endfor %}</tr>
{% endfor %}</table></div>
{% endfor %}

{% if training %}
<h2>Training</h2>
{% for plot in training %}{{ figure(plot) }}{% endfor %}
{% endif %}

<h2>What was reused, and what it cost</h2>
<p>{{ cost.summary }}</p>
{% for block in cost.tables %}<div class="card"><table>
<tr>{% for column in block.columns %}<th>{{ column }}</th>{% endfor %}</tr>
{% for row in block.rows %}<tr>{% for value in row %}<td>{{ value }}</td>{% endfor %}</tr>{% endfor %}
</table></div>{% endfor %}

<h2>Where it comes from</h2>
<div class="card"><table>
{% for name, value in provenance %}
<tr><td>{{ name }}</td><td class="wrap"><code>{{ value }}</code></td></tr>
{% endfor %}
</table></div>
<details><summary>All parameters</summary><pre><code>{{ parameters }}</code></pre></details>
</main>
</body>
</html>
"""
