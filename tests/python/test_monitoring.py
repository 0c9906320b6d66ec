"""The alert rules, the dashboard and the documents name what the daemon serves. PROMTOOL names
Prometheus' own checker, if it shall be asked."""

import json
import os
import pathlib
import re
import subprocess

import pytest

import tinyserve
from test_metrics import ask, free_port

FOLDER = pathlib.Path(__file__).parents[2] / "systemd" / "monitoring"
DOCUMENTS = FOLDER.parent
SCRAPED = {"job", "instance", "le"}  # labels that Prometheus adds, and a histogram's

pytestmark = pytest.mark.skipif(not FOLDER.is_dir(),
                                reason="the tests of a bundle have no sources beside them")


@pytest.fixture
def metrics(start_daemon):
    """What /metrics has: labels by the name of the metric, from a daemon that has refused, too."""
    port = free_port()
    daemon = start_daemon(settings={"metrics": f"127.0.0.1:{port}"})
    with tinyserve.connect(daemon.url) as client, client.pool("tiny") as kv:
        with pytest.raises(tinyserve.NoSpaceError):
            kv.step(kv.create(1), [1000])
        text = ask(port)[1]
    labels = {}
    for line in text.splitlines():
        kind = re.fullmatch(r"# TYPE (\w+) (\w+)", line)
        if kind:
            ends = ("_bucket", "_sum", "_count") if kind[2] == "histogram" else ("",)
            labels.update({kind[1] + end: set() for end in ends})
        elif not line.startswith("#"):
            name = re.match(r"\w+", line)[0]
            labels[name] |= set(re.findall(r'(\w+)="', line))
    labels["tinyserve_pool_mps"].add("pool")  # only pools on a GPU have it
    labels["up"] = set()  # Prometheus' own
    return labels


def expressions_of_dashboard():
    dashboard = json.loads((FOLDER / "dashboard.json").read_text())
    assert dashboard["panels"] and dashboard["uid"] == "tinyserve"
    found = [(p["title"], t["expr"]) for p in dashboard["panels"] for t in p["targets"]]
    found += [(a["name"], a["expr"]) for a in dashboard["annotations"]["list"]]
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            query = variable["query"]["query"]
            metric = re.fullmatch(r"label_values\((.+), (\w+)\)", query)
            assert metric, query
            found.append((variable["name"], f"sum by ({metric[2]}) ({metric[1]})"))
    return found


def expressions_of_alerts():
    """By the indentation, so that no reader of YAML is needed."""
    text = (FOLDER / "alerts.yml").read_text()
    found = re.findall(r"- alert: (\w+)\n +expr: (>-\n(?: {10}.*\n)+|.*\n)", text)
    assert len(found) == text.count("- alert:") > 5
    return [(name, " ".join(expr.replace(">-", "").split())) for name, expr in found]


def check_expression(where, expression, metrics):
    plain = re.sub(r'"(\\.|[^"\\])*"', '""', expression)
    names = re.findall(r"\b(?:tinyserve_\w+|up)\b", plain)
    assert names, where
    known = set(SCRAPED)
    for name in names:
        assert name in metrics, f"{where}: the daemon has no {name}"
        known |= metrics[name]
    for name, selector in re.findall(r"(\w+)\{([^}]*)\}", plain):
        used = set(re.findall(r"(\w+) *(?:=~|!~|!=|=)", selector))
        assert used <= metrics[name] | SCRAPED, f"{where}: {name} has no label {used}"
    for grouped in re.findall(r"\b(?:by|on) \(([^)]*)\)", plain):
        used = {label.strip() for label in grouped.split(",")}
        assert used <= known, f"{where}: none of {names} has {used - known}"


def test_dashboard_and_alerts_ask_for_what_the_daemon_serves(metrics):
    for where, expression in expressions_of_dashboard() + expressions_of_alerts():
        check_expression(where, expression, metrics)


def test_a_name_or_a_label_that_is_not_served_is_found(metrics):
    for wrong in ("tinyserve_pool_bloks", 'tinyserve_sessions{pool="p"}',
                  "sum by (pool) (tinyserve_sessions)", "tinyserve_evicted_block_age_seconds"):
        with pytest.raises(AssertionError, match="the daemon has no|has no label|none of"):
            check_expression("here", wrong, metrics)


def test_documents_name_what_the_daemon_serves(metrics):
    found = 0
    for document in sorted(DOCUMENTS.glob("*.md")):
        for name in re.findall(r"\btinyserve_[a-z_]+\b", document.read_text()):
            if not name.startswith("tinyserve_version"):
                found += 1
                assert name in metrics or f"{name}_bucket" in metrics, f"{document}: {name}"
    assert found > 8


def test_what_the_daemon_serves_is_named_by_a_document_a_panel_or_an_alert(metrics):
    said = "".join(d.read_text() for d in (*DOCUMENTS.glob("*.md"), FOLDER / "alerts.yml",
                                           FOLDER / "dashboard.json"))
    named = {re.sub("_(bucket|sum|count)$", "", name)
             for name in re.findall(r"\btinyserve_\w+", said)}
    assert {re.sub("_(bucket|sum|count)$", "", name) for name in metrics} - {"up"} <= named


def test_the_configuration_of_the_page_for_kubernetes_is_one(tmp_path):
    page = (DOCUMENTS / "kubernetes.md").read_text()
    block = re.search(r"  tinyserved.conf: \|\n((?: {4}.*\n)+)", page)[1]
    (tmp_path / "conf").write_text(re.sub("(?m)^ {4}", "", block))
    subprocess.run([os.environ["TS_TEST_DAEMON"], "--check-config", "--config", tmp_path / "conf"],
                   check=True, timeout=60)


@pytest.mark.skipif("PROMTOOL" not in os.environ, reason="PROMTOOL names no checker")
def test_prometheus_takes_the_rules_and_each_fires_where_it_should(tmp_path):
    tool = os.environ["PROMTOOL"]
    for arguments in (["check", "rules", "alerts.yml"], ["test", "rules", "alerts_test.yml"]):
        subprocess.run([tool, *arguments], cwd=FOLDER, check=True, timeout=60)
    # The dashboard's expressions, as rules.
    rules = [{"record": f"r{i}", "expr": re.sub(r"\$__\w+", "5m", expression)}
             for i, (_, expression) in enumerate(expressions_of_dashboard())]
    file = tmp_path / "dashboard.yml"  # JSON is YAML
    file.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))
    subprocess.run([tool, "check", "rules", "--lint=none", file], check=True, timeout=60)
    # Each alert has a case in which it fires.
    tested = (FOLDER / "alerts_test.yml").read_text()
    for name, _ in expressions_of_alerts():
        assert re.search(rf"alertname: {name}\n +exp_alerts:", tested), name
