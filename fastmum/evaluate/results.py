"""Results of evaluations next to the paper's numbers: a table, and a page."""

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from statistics import mean, stdev
from typing import Any, NamedTuple

from fastmum.data.errors import DataError
from fastmum.evaluate.records import MATCHERS, MATCHING, Record
from fastmum.geometry.metrics import STANDARD

# The paper's EPE of linear probes (Table 4), EPE and recall (NAVI) of cosine matching (supplement, Table 13); AUC@30,
# and medians of accuracy and completeness, of reconstruction on frozen encoders and distilled, and AUC@5 of relative
# pose (davnords.com/mum).
PUBLISHED: dict[str, dict[str, dict[str, float | tuple[float, float]]]] = {
    "matching": {
        "MuM": {"megadepth": 10.2, "scannet": 27.9},
        "DINOv3": {"megadepth": 19.0, "scannet": 28.7},
        "CroCo v2": {"megadepth": 27.3},
        "MAE": {"megadepth": 29.7, "scannet": 35.0},
    },
    "cosine": {
        "MuM": {"navi": 46.9, "megadepth": 50.8, "scannet": 55.7},
        "DINOv3": {"navi": 62.8, "megadepth": 36.5, "scannet": 56.4},
        "CroCo v2": {"navi": 41.0, "megadepth": 60.3, "scannet": 62.1},
        "MAE": {"navi": 43.7, "megadepth": 88.8, "scannet": 83.4},
    },
    "reconstruction": {
        "MuM": {"co3d_test": 71.5, "realestate10k_test": 50.8, "dtu": (3.7, 1.6), "eth3d": (0.8, 0.8)},
        "DINOv3": {"co3d_test": 66.9, "realestate10k_test": 36.7, "dtu": (6.4, 3.7), "eth3d": (0.9, 1.0)},
        "CroCo v2": {"co3d_test": 58.2, "realestate10k_test": 27.7, "dtu": (8.5, 12.3), "eth3d": (0.9, 1.0)},
        "MuM, distilled": {"co3d_test": 62.6, "realestate10k_test": 50.9, "dtu": (6.4, 2.6), "eth3d": (0.6, 0.5)},
        "random, distilled": {"co3d_test": 10.6, "realestate10k_test": 28.0, "dtu": (8.4, 11.7), "eth3d": (1.0, 1.4)},
    },
    "pose": {"MuM": {"megadepth": 26.7}, "DINOv3": {"megadepth": 15.6}, "CroCo v2": {"megadepth": 13.9}},
}
OF_RUNS = ("reconstruction", "pose", "roma")  # evaluations of runs of these tasks, not of encoders
PUBLISHED_SCORES = {  # of evaluations or sets; of the others EPE
    "pose": ("auc5",),
    "navi": ("recall",), "co3d_test": ("auc30",), "realestate10k_test": ("auc30",),
    "dtu": ("acc_median", "comp_median"), "eth3d": ("acc_median", "comp_median"),
}  # fmt: skip
PUBLISHED_PROTOCOL = {"matching": "matchbench", "cosine": "matchbench"}  # of sets with EPE
PUBLISHED_PAIRS = {"megadepth": 1000, "scannet": 1500, "realestate10k_test": 1386, "dtu": 22, "eth3d": 13}
POSE_PAIRS = 1500  # of the sets with published numbers of pose
TITLES = {
    "megadepth": "MegaDepth", "scannet": "ScanNet", "navi": "NAVI", "co3d_test": "CO3D", "dtu": "DTU",
    "realestate10k_test": "RealEstate10K", "eth3d": "ETH3D", "imagenet": "ImageNet-1K",
    "inaturalist": "iNaturalist 2021", "sun397": "SUN397", "places": "Places", "ade20k": "ADE20K", "voc": "VOC 2012",
}  # fmt: skip
SCORES = {
    "epe": "EPE ↓", "robustness": "R ↑", "pck1": "PCK@1 ↑", "pck3": "PCK@3 ↑", "pck5": "PCK@5 ↑",
    "recall": "Recall ↑", "recall_1cm": "1 cm ↑", "recall_2cm": "2 cm ↑", "recall_5cm": "5 cm ↑",
    "auc30": "AUC@30 ↑", "auc20": "AUC@20 ↑", "auc15": "AUC@15 ↑", "auc10": "AUC@10 ↑", "auc5": "AUC@5 ↑",
    "auc3": "AUC@3 ↑", "rotation_median": "rotation ↓", "direction_median": "direction ↓", "acc_mean": "acc ↓",
    "acc_median": "acc median ↓", "comp_mean": "comp ↓", "comp_median": "comp median ↓", "nc_mean": "normals ↑",
    "nc_median": "normals median ↑", "abs_rel": "AbsRel ↓", "rmse": "RMSE ↓", "a1": "δ₁ ↑",
    "top1_patch": "top-1 attentive ↑", "top1_cls": "top-1 CLS ↑", "top1_avg_patch": "top-1 mean ↑",
    "top1_cls_avg_patch": "top-1 CLS + mean ↑", "knn_miou": "k-NN mIoU ↑", "logreg_miou": "log. regr. mIoU ↑",
    "knn_accuracy": "k-NN pixels ↑", "logreg_accuracy": "log. regr. pixels ↑", "knn_ignored": "ignored labels, k-NN",
}  # fmt: skip
HEADLINES = {  # scores of evaluations in the table of all; of the others the first one of `SCORES` that they have
    "matching": ("epe",), "cosine": ("epe", "recall"), "views": ("views_1", "views_8"), "depth": ("rmse", "abs_rel"),
    "recognition": ("top1_patch",), "segmentation": ("knn_miou", "logreg_miou"), "roma": ("epe", "auc20"),
    "reconstruction": ("auc30", "acc_median", "comp_median", "abs_rel"), "pose": ("auc5", "auc20", "rotation_median"),
}  # fmt: skip
OTHER_VIEWS = {"same": "with views of the same scene", "other": "with views of another scene"}  # results of "views"
NAMED = ("per_pair_epe", "per_sequence", "per_image")  # scores by the names of what was measured
THREE_DIGITS = ("acc_", "comp_", "nc_", "abs_rel", "rmse", "a1", "views_")  # starts of the names of scores
VIEWS = "views_"  # prefix of scores that are losses; the number of views follows
COUNTED = {  # what the numbers of other tasks than pairs count
    "views": " frames", "reconstruction": " sequences", "depth": " images", "recognition": " images",
    "segmentation": " images",
}  # fmt: skip
PARTS = {"blocks": "global block", "by_head": "head"}  # of a result, with scores of their own
COUNTED_SCORES = ("knn_ignored",)  # without digits after the point
NONE = "–"
SEED = re.compile(r"( \d{1,2}|-\d)$")  # at the end of a name: not a size, a number of epochs or a step
Contents = list[dict[str, Any]]  # of the seeds of one model
NOTE = (
    "EPE: end-point error in pixels of 448 x 448 (dense matching by runs: of their size). R: matches within 32 px, "
    "PCK@k: within k px, recall: within 1, 2 and 5 cm, in percent. The paper's numbers are EPE by the protocol "
    "matchbench, and recall on NAVI (Table 4: linear probe; Table 13: cosine). Masked loss: of the same frames, "
    "without and with the nearest other views; 1.0 is the loss of predicting each patch's mean. AUC: of relative "
    "poses, in percent; acc, comp: distance of predicted to true points and the reverse, in the unit of the set; the "
    "paper's are AUC@30, and medians of acc / comp, and AUC@5 of relative pose. Rotation, direction: medians in "
    "degrees. Depth: RMSE in metres, δ₁ the share of pixels within a factor of 1.25, means over images; of the head, "
    "learning rate and weight decay that are best on left-out training scenes, or with --choose-on test on the test "
    "images (chosen_on in the JSON). Top-1: by the probe of each source of features that is best on a tenth of the "
    "training images, in percent. mIoU as CAPI: the mean over labels that occur in truth or prediction, in percent; "
    "k-NN also predicts labels that are not scored (their number is in the column of ignored labels), each of which "
    "counts as a class with an IoU of 0. Pixels: right ones, in percent."
)


class ResultTable(NamedTuple):
    """Column names and rows of text."""

    names: list[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        """The table as aligned Markdown."""
        return markdown([self.names, *self.rows]) + "\n"


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """An aligned Markdown table; the first row has the names of the columns."""
    cells = [[" ".join(text.split()).replace("|", "\\|") for text in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells]
    ruler = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([f"| {lines[0]} |", ruler, *(f"| {line} |" for line in lines[1:])])


def mean_sd(values: Iterable[float | None], digits: str, among: int = 0) -> str:
    """Mean and standard deviation of the values that are not None; their number follows if it is less than `among`."""
    there = [value for value in values if value is not None]
    if not there:
        return NONE
    around = f" ± {format(stdev(there), digits.lstrip('+'))}" if len(there) > 1 else ""
    return f"{format(mean(there), digits)}{around}" + (f" ({len(there)})" if len(there) < among else "")


class Measured(NamedTuple):
    """What a result was measured on; only results of the same evaluation on the same can be compared."""

    set: str
    pairs: int | None  # number of pairs, or of frames for "views"; None if an old result does not say it
    names: frozenset[str]  # of the pairs or sequences, empty if the result does not say them
    size: int | None  # side of the pictures in pixels
    protocol: str | None = None  # of matching


class ResultGroup(NamedTuple):
    """Results that can be compared, and the published scores that they can be compared with."""

    task: str
    on: Measured
    label: str  # the set
    contents: list[dict[str, Any]]
    paper: dict[str, float | tuple[float, float]]  # by method

    def about(self) -> list[str]:
        """The set, the number of pairs, and the size, as text."""
        count = NONE if self.on.pairs is None else f"{self.on.pairs:,}{COUNTED.get(self.task, '')}"
        return [self.label, count, NONE if self.on.size is None else str(self.on.size)]

    @property
    def protocol(self) -> str:
        """Its name as text."""
        return self.on.protocol or NONE


def measured_on(content: dict[str, Any]) -> Measured:
    """What a result was measured on."""
    settings = content["settings"]
    numbers = content.get("pairs", settings.get("targets", content["scores"].get("pairs"))), settings.get("size")
    count, size = (int(each) if isinstance(each, int | float) else None for each in numbers)
    names = frozenset(next((content[key] for key in NAMED if key in content), ()))
    protocol = content.get("protocol", "patches") if content["task"] in MATCHING else None
    return Measured(content["set"], count, names, size, None if "recall" in content["scores"] else protocol)


def set_of(content: dict[str, Any]) -> str:
    """The set of a result, and the protocol of matching unless it is "patches"."""
    protocol = content.get("protocol", "patches")
    return content["set"] if protocol == "patches" else f"{content['set']}, {protocol}"


def models(contents: Iterable[dict[str, Any]], alone: bool = False) -> dict[str, str]:
    """The model that each name of weights is a seed of: names without their final number, `SEED`, if they are several.

    Results of one evaluation must be of encoders of one kind after as many frames; else, and without a number, each
    name is a model of its own. With `alone` a name that is the only seed loses its number, too.
    """
    numbered, found = dict[str, Contents](), dict[str, str]()
    for content in contents:
        name = content["weights"]
        found[name] = name
        if SEED.search(name):
            numbered.setdefault(SEED.sub("", name), []).append(content)
    for model, same in numbered.items():
        names = {content["weights"] for content in same}
        kinds = {(each["task"], each.get("frames"), str(each.get("encoder", {}).get("kind"))) for each in same}
        if (alone or len(names) > 1) and len(kinds) == len({content["task"] for content in same}):
            found |= dict.fromkeys(names, f"{model} (seeds)" if model in found else model)
    return found


def check_same(contents: Contents) -> None:
    """Check that results were measured on the same pairs with the same settings; else raise a `DataError`.

    Seeds may differ. What was measured is not compared with an old result that does not say it.
    """
    first = max(contents, key=lambda content: len(measured_on(content).names))
    for other in contents:
        a, b = first["settings"], other["settings"]
        different = {key for key in a.keys() | b.keys() if a.get(key) != b.get(key)} - {"seed"}
        for one, another in zip(measured_on(first), measured_on(other), strict=True):
            different |= {"pairs"} if one and another and one != another else set()
        if different or first.get("views") != other.get("views"):
            names = f"'{first['weights']}' and '{other['weights']}'"
            what = ", ".join(sorted(different)) or "views"
            raise DataError(f"{names} were evaluated with different {what}; move one of them to another folder")


def group(contents: Iterable[dict[str, Any]]) -> list[ResultGroup]:
    """Results by evaluation and pairs; a group without results for every other set that the paper has numbers of."""
    found: dict[tuple[str, Measured], list[dict[str, Any]]] = {}
    measured = [(content, measured_on(content)) for content in contents]
    named = defaultdict[tuple[str, Measured], set[Measured]](set)
    for content, on in measured:
        if on.names:
            named[content["task"], on._replace(names=frozenset())].add(on)
    for content, on in measured:  # without names: with those of as many pairs, if these are all the same
        others = named.get((content["task"], on), set())
        found.setdefault((content["task"], *(others if len(others) == 1 else {on})), []).append(content)
    kinds: dict[tuple[Any, ...], list[frozenset[str]]] = {}
    groups = []
    for (task, on), results in found.items():
        same = kinds.setdefault((on.set, on.pairs, task if task in COUNTED else ""), [])  # as many pairs, but others
        same += [on.names] if on.names not in same else []
        other = f" ({same.index(on.names) + 1})" if same.index(on.names) else ""
        whole = {_published_pairs(task, on.set), *(content.get("set_pairs") for content in results)} - {None}
        same_points = on.protocol in (None, PUBLISHED_PROTOCOL.get(task))
        same_points &= on.protocol != "matchbench" or on.size in (None, STANDARD)
        paper = _published(task, on.set) if same_points and (on.pairs is None or whole <= {on.pairs}) else {}
        groups.append(ResultGroup(task, on, TITLES.get(on.set, on.set) + other, results, paper))
    for task in dict.fromkeys(each.task for each in groups):
        compared = {each.on.set for each in groups if each.task == task and each.paper}
        for name in dict.fromkeys(name for values in PUBLISHED.get(task, {}).values() for name in values):
            if name not in compared:
                protocol = PUBLISHED_PROTOCOL.get(task) if name not in PUBLISHED_SCORES else None
                on = Measured(name, _published_pairs(task, name), frozenset(), None, protocol)
                groups.append(ResultGroup(task, on, TITLES[name], [], _published(task, name)))
    return sorted(groups, key=lambda each: [*MATCHERS].index(each.task))


def _published_pairs(task: str, name: str) -> int | None:
    return POSE_PAIRS if task == "pose" else PUBLISHED_PAIRS.get(name)


def _published(task: str, name: str) -> dict[str, float | tuple[float, float]]:
    return {method: values[name] for method, values in PUBLISHED.get(task, {}).items() if name in values}


def table(records: Sequence[Record]) -> ResultTable:
    """A row for each matcher, set of pairs and weights, with the paper's numbers for the same matcher and set.

    The first rows are the scores of the identity warp on each set of pairs. The paper's sets have a row even without
    results; its numbers are next to results on all pairs of a set only.
    """
    groups = group(record.content for record in records)
    only = bool(records) and all(record.content["task"] not in (*MATCHING, "views") for record in records)
    columns = _columns([record.content for record in records], always=() if only else ("epe",))
    shown = {each.task for each in groups} | (set() if only else {*MATCHING})
    tasks = [task for task in PUBLISHED if task in shown]
    methods = list(dict.fromkeys(method for task in tasks for method in PUBLISHED[task]))
    still, rows = [], []
    for each in groups:
        paper = [_number(each.paper.get(method)) for method in methods]
        for content in each.contents or [{"weights": NONE, "scores": {}}]:
            about, cells = [MATCHERS[each.task], *each.about()], _cells(content["scores"], columns)
            rows.append([*about, content["weights"], each.protocol, *cells, *paper])
            if "no_motion" in content:
                cells = _cells(content["no_motion"], columns)
                still.append(["no motion", *each.about(), NONE, each.protocol, *cells, *[NONE] * len(methods)])
    still = [row for i, row in enumerate(still) if row not in still[:i]]
    names = ["matcher", "set", "pairs", "size", "weights", "protocol", *map(score_title, columns)]
    return ResultTable([*names, *(f"paper: {method}" for method in methods)], still + rows)


def group_table(group: ResultGroup) -> ResultTable:
    """A row for each weights of a group, the identity warp before them, and the paper's methods after them."""
    first = PUBLISHED_SCORES.get(group.task) or PUBLISHED_SCORES.get(group.on.set, ("epe",))
    columns = _columns(group.contents, always=first if group.paper else ())
    still = [["no motion", *_cells(each["no_motion"], columns)] for each in group.contents if "no_motion" in each]
    rows = [row for i, row in enumerate(still) if row not in still[:i]]
    rows += [[content["weights"], *_cells(content["scores"], columns)] for content in group.contents]
    for method, score in group.paper.items():
        values = dict(zip(first, score if isinstance(score, tuple) else (score,), strict=True))
        rows.append([f"{method} (paper)", *(_number(values.get(name)) for name in columns)])
    return ResultTable(["weights", *map(score_title, columns)], rows)


def _columns(contents: Iterable[dict[str, Any]], always: tuple[str, ...]) -> list[str]:
    """Scores that are shown: those of any result, and `always`."""
    there = {name for content in contents for name in content["scores"]} | {*always}
    losses = [name for name in there if name.startswith(VIEWS) and name.removeprefix(VIEWS).isdecimal()]
    return [name for name in SCORES if name in there] + sorted(losses, key=lambda name: int(name.removeprefix(VIEWS)))


def _cells(scores: dict[str, float | None], columns: list[str]) -> list[str]:
    return [_number(scores.get(name), digits(name)) for name in columns]


def digits(name: str) -> int:
    """Digits after the point that a score is printed with."""
    return 0 if name in COUNTED_SCORES else 3 if name.startswith(THREE_DIGITS) else 1


def score_title(name: str) -> str:
    """Title of a score's column; the arrow points to the better direction."""
    if name.startswith(VIEWS):
        count = name.removeprefix(VIEWS)
        return f"loss, {count} view{'s' * (count != '1')} ↓"
    return SCORES[name]


def _number(value: float | tuple[float, ...] | None, digits: int = 1) -> str:
    if isinstance(value, tuple):
        return " / ".join(_number(each, digits) for each in value)
    return NONE if value is None else f"{value:.{digits}f}"
