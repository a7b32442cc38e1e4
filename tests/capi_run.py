"""Runs CAPI's evaluations, as they are, on a CPU: python capi_run.py JOB, where JOB is JSON; prints JSON.

CAPI expects CUDA, several processes and cuML. Here devices named cuda are the CPU, the group has one process, and the
logistic regression is scikit-learn's.
"""

import json
import os
import pathlib
import sys
import types

os.environ["TORCHDYNAMO_DISABLE"] = "1"

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from torch.overrides import TorchFunctionMode


class OnCPU(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.cuda:
            return args[0]
        kwargs = {name: "cpu" if name == "device" and str(x) == "cuda" else x for name, x in (kwargs or {}).items()}
        return func(*args, **kwargs)


def regression(penalty, C, max_iter, output_type, tol, linesearch_max_iter, verbose):
    estimator = LogisticRegression(C=C, max_iter=max_iter, tol=tol)
    estimator.solver_model = types.SimpleNamespace()
    return estimator


def main(job):
    sys.path.insert(0, job["capi"])
    for name in ("cuml", "cuml.linear_model"):
        sys.modules[name] = types.ModuleType(name)
    sys.modules["cuml"].linear_model = sys.modules["cuml.linear_model"]
    sys.modules["cuml.linear_model"].LogisticRegression = regression
    glob = pathlib.Path.glob
    pathlib.Path.glob = lambda self, pattern: iter(sorted(glob(self, pattern)))  # the order of files is the system's
    import eval_classification
    import eval_segmentation
    import utils

    torch.distributed.init_process_group("gloo", init_method=f"file://{job['out']}/group", rank=0, world_size=1)
    found, loader = {}, job["loader"]
    with OnCPU():
        for name, kwargs in job["models"].items():
            for module, settings in ((eval_classification, job["images"]), (eval_segmentation, job["maps"])):
                torch.manual_seed(0)
                np.random.seed(0)
                model = utils.import_path(loader).__model_loader__(device="cpu", **kwargs)
                out = pathlib.Path(job["out"], name, module.__name__)
                out.mkdir(parents=True)
                scores = module.eval_model(model, lambda scores: None, output_dir=str(out), **settings)
                found[f"{name} {module.__name__}"] = {key: float(value) for key, value in scores.items()}
    print(json.dumps(found))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
