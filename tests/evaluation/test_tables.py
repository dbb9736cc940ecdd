from upsnet.evaluation.tables import summary_tables

ROW = {"category_id": 1, "pq": 0.0, "sq": 0.0, "rq": 0.0, "tp": 0, "fp": 0, "fn": 0, "isthing": False}
SUMMARY = {
    "panoptic": {
        "all": {"pq": 42.4567, "sq": 80.0, "rq": 50.04, "n": 2},
        "things": {"pq": None, "sq": None, "rq": None, "n": 0},
        "stuff": {"pq": 42.4567, "sq": 80.0, "rq": 50.04, "n": 2},
        "per_class": [{**ROW, "name": "sky", "tp": 3, "pq": 33.333}, {**ROW, "name": "unseen"}],
    },
    "box": dict.fromkeys(("ap", "ap50", "ap75", "ap_s", "ap_m", "ap_l"), 12.34),
    "semantic": {"miou": 10.0, "miou_present": 99.96, "aacc": 5.0, "macc": None},
}


def test_tables():
    text = summary_tables(SUMMARY, per_class=True)
    lines = text.splitlines()
    assert lines[0].split() == ["PQ", "SQ", "RQ", "n"]
    assert lines[2].split() == ["All", "42.5", "80.0", "50.0", "2"]
    assert lines[3].split() == ["Things", "–", "–", "–", "0"]
    assert "unseen" not in text and "33.3" in text
    assert "Box" in text and "Mask" not in text and "100.0" in text
    # Columns are aligned: every number of a column ends where its head ends.
    assert lines[0].index("PQ") + 2 == lines[2].index("42.5") + 4


def test_only_what_was_scored():
    assert summary_tables({}) == ""
    assert "mIoU" not in summary_tables({"panoptic": SUMMARY["panoptic"]})
