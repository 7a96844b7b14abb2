"""The linear probe: logistic regression on the features of the frozen model, the figure that training has to beat."""

import torch
from classifier_training import Rows, accuracy
from tqdm import tqdm


@torch.no_grad()
def features(model, rows: Rows, batch_size: int, device: str) -> torch.Tensor:
    """Return what the model's head reads (float32, rows x features), in the order of `rows`."""
    found = []
    hook = model.classifier.register_forward_pre_hook(
        lambda _, inputs: found.append(inputs[0].float().flatten(1).cpu())
    )
    was_training = model.training
    model.eval()
    try:
        for picked in tqdm(list(rows.batches(batch_size)), desc="frozen features", unit="batch"):
            model(**rows.batch(picked, device)[0])
    finally:
        hook.remove()
        model.train(was_training)
    return torch.cat(found)


def linear_probe(train: torch.Tensor, train_labels: torch.Tensor, test: torch.Tensor, labels: torch.Tensor) -> float:
    """Return the test accuracy of a logistic regression, found with L-BFGS on standardized features.

    It minimises the mean cross-entropy plus |W|^2 / (2 rows): scikit-learn's objective with its default C = 1.
    """
    mean, std = train.mean(0), train.std(0).clamp_min(1e-6)
    train, test = (train - mean) / std, (test - mean) / std
    classes = int(max(train_labels.max(), labels.max())) + 1
    weight = torch.zeros(classes, train.shape[1], requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

    def objective() -> torch.Tensor:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(train @ weight.T + bias, train_labels)
        loss = loss + weight.square().sum() / (2 * len(train))
        loss.backward()
        return loss

    optimizer.step(objective)
    return accuracy((test @ weight.T + bias).detach(), labels)
