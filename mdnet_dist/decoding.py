"""Saying reports: greedy and beam search, batched over images and topics, without any randomness.

All beams that still grow are rows of one batch, whichever sentence they belong to; the beams of an image share its map.

Shapes: B images, K topics, L of the B*K searches still undecided, W beams, R of their L*W beams still growing,
T tokens, P map positions, V words, E embedding, H hidden, A attention, C channels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mdnet_dist.model.language_model import LanguageModel, View
from mdnet_dist.vocabulary import END, PAD, START, UNKNOWN

NEVER_SAID = (PAD, START, UNKNOWN)

NUMBERS_IN_CACHE = 1 << 18
"""Of the attention's hidden layer (rows, P, A) that a CPU computes at a time."""

NUMBERS_ON_GPU = 1 << 26


class Sentences(NamedTuple):
    """The best sentence of each image and topic."""

    tokens: Tensor  # (B, K, T): END behind the last word, PAD after it
    log_likelihoods: Tensor  # (B, K, T): of each token; 0 after END
    attention: Tensor  # (B, K, T, P): where the model looked for each token; 0 after END


class _Step(NamedTuple):
    """What one step decided, to be followed back from the winning beams at the end."""

    live: Tensor  # (L): the searches that it belongs to
    beam: Tensor  # (L, W): which beam of the step before each continues
    word: Tensor  # (L, W)
    log_likelihood: Tensor  # (L, W): of the word
    row: Tensor  # (L, W): of `weights`, by the beam of the step before; -1 for those that had ended
    weights: Tensor  # (R, P): attention


@torch.no_grad()
def decode(language_model: LanguageModel, view: View, max_tokens: int, beam_width: int = 1) -> Sentences:
    """Search for the most probable sentence on every topic.

    The search keeps the `beam_width` most probable beginnings; at the end the sentence with the largest mean
    log-likelihood of its tokens wins (a sum would favour short sentences). Width 1 is greedy decoding. An ended beam
    costs nothing, and a search stops once no further word can change which of its sentences wins.

    Args:
        view: what L knows of B images, from `LanguageModel.look`.
        max_tokens: longest sentence, its end token included; a sentence that is longer ends without END.
    """
    W, device = beam_width, view.features.device
    look_every = _steps_between_looks(device)
    starts = language_model.starts(view)
    B, K, _ = starts.shape
    V = language_model.output.out_features
    cell = _Cell(language_model, B * K * W)
    maps = _Maps(language_model, view)
    unsayable = torch.zeros(V, device=device)
    for word_number in NEVER_SAID:
        unsayable[word_number] = -torch.inf
    only_pad = torch.full((V,), -torch.inf, device=device)
    only_pad[PAD] = 0.0

    live = torch.arange(B * K, device=device)
    image = torch.arange(B).repeat_interleave(K)  # of each live search, on the CPU
    winner = torch.zeros_like(live)  # beam of each search
    totals = torch.full((B * K, W), -torch.inf, device=device)
    totals[:, 0] = 0.0  # all beams begin alike: let the first alone branch out
    lengths = torch.zeros(B * K, W, dtype=torch.long, device=device)  # in tokens, of the beams that have ended; else 0
    place = live * W  # (R), among the L*W beams, of each row of the tensors that follow
    row = _rows_of(place, lengths)
    hidden, memory = cell.begin(starts.flatten(0, 1))
    last = torch.full_like(place, START)
    maps.lay_out(image)
    steps: list[_Step] = []

    for t in range(max_tokens):
        contexts, weights = maps.attend(hidden)
        hidden, memory = cell.step(last, hidden, memory)
        logits = language_model.word_logits(hidden, contexts).float()
        log_probabilities = logits.log_softmax(1)  # (R, V), as in training: what is never said keeps its share
        log_probabilities += unsayable
        if len(place) < row.numel():
            nothing = log_probabilities.new_full((row.numel(), V), -torch.inf)
            log_probabilities = nothing.index_copy_(0, place, log_probabilities)
        log_probabilities = log_probabilities.view(-1, W, V)
        if t:  # an ended beam goes on in one way only, by PAD at no cost
            log_probabilities = torch.where(lengths[..., None] > 0, only_pad, log_probabilities)
        totals, choice = (totals[..., None] + log_probabilities).flatten(1).topk(W, dim=1)  # of W*V
        beam = choice // V
        word = choice - beam * V
        log_likelihood = log_probabilities.flatten(1).gather(1, choice)
        steps.append(_Step(live, beam, word, log_likelihood, row, weights))
        lengths = lengths.gather(1, beam)
        lengths = torch.where((lengths == 0) & (word == END), t + 1, lengths)

        fewer, last_step = False, t + 1 == max_tokens
        if last_step or (t + 1) % look_every == 0:
            winner[live] = (totals / torch.where(lengths > 0, lengths, t + 1)).argmax(1)
            undecided = _undecided(totals, lengths, max_tokens).cpu()
            if last_step or not undecided.any():
                break
            fewer = not undecided.all()
        before = row.gather(1, beam)  # (L, W)
        if fewer:
            kept = undecided.nonzero().squeeze(1)
            image = image[kept]
            kept = kept.to(device)
            live, totals, lengths, word, before = (part[kept] for part in (live, totals, lengths, word, before))
        last = word.flatten()
        if fewer or W > 1:
            if look_every == 1:
                place = ((lengths == 0) & (totals > -torch.inf)).flatten().nonzero().squeeze(1)
                maps.lay_out(image[place // W])
            else:  # all beams of a live search stay rows, whether they grow or not
                place = torch.arange(len(last), device=device)
                if fewer or t == 0:
                    maps.lay_out(image.repeat_interleave(W))
            row = _rows_of(place, lengths)
            last = last[place]
            hidden, memory = (part.index_select(0, before.flatten()[place].clamp(min=0)) for part in (hidden, memory))

    P = view.features.shape[1]
    return Sentences(*(part.unflatten(0, (B, K)) for part in _followed_back(steps, winner, max_tokens, P)))


def _steps_between_looks(device: torch.device) -> int:
    """How often the host asks which beams and searches are done: each time it has to wait for a GPU."""
    return 1 if device.type == "cpu" else 4


def _rows_of(place: Tensor, beams: Tensor) -> Tensor:
    """Which row stands for each beam, (L, W), -1 for none. Args: place: (R) in L*W; beams: any (L, W)."""
    row = torch.full((beams.numel(),), -1, device=place.device)
    row[place] = torch.arange(len(place), device=place.device)
    return row.view(beams.shape)


def _undecided(totals: Tensor, lengths: Tensor, max_tokens: int) -> Tensor:
    """Which searches (L) may still end with another winner than the best of their ended beams.

    Beams only lose likelihood as they grow. So an ended beam stays in the search for good if its total is above that of
    every beam that goes on, and it wins if its mean is above the best that these could reach: their totals, spread over
    a sentence of full length.

    Args:
        totals, lengths: (L, W), as in `decode`.
    """
    ended = lengths > 0
    mean, best = torch.where(ended, totals / lengths, -torch.inf).max(1)
    growing = totals.masked_fill(ended, -torch.inf).amax(1)
    return (totals.gather(1, best[:, None])[:, 0] <= growing) | (mean <= growing / max_tokens)


def _followed_back(steps: list[_Step], winner: Tensor, max_tokens: int, P: int) -> tuple[Tensor, Tensor, Tensor]:
    """The winners' tokens, log-likelihoods (N, T) and attention (N, T, P). Args: winner: beam of each search (N)."""
    N, device = len(winner), winner.device
    tokens = torch.full((N, max_tokens), PAD, device=device)
    likelihoods = torch.zeros(N, max_tokens, device=device)
    attention = torch.zeros(N, max_tokens, P, device=device)
    beam = winner.clone()
    for t in reversed(range(len(steps))):
        step = steps[t]
        now = beam[step.live][:, None]
        before = step.beam.gather(1, now)
        word = step.word.gather(1, now)
        weights = step.weights[step.row.gather(1, before).squeeze(1)].float()
        tokens[step.live, t] = word.squeeze(1)
        likelihoods[step.live, t] = step.log_likelihood.gather(1, now).squeeze(1)
        attention[step.live, t] = weights.masked_fill_(word == PAD, 0.0)
        beam[step.live] = before.squeeze(1)
    return tokens, likelihoods, attention


class _Cell:
    """The language model's LSTM, one step at a time: nn.LSTM would prepare its weights anew at each."""

    def __init__(self, language_model: LanguageModel, beams: int) -> None:
        """Args: beams: how many words a step says at most."""
        self._embedding = language_model.word_embedding
        self._inputs, recurrent, bias, other_bias = language_model.lstm.all_weights[0]
        self._bias = bias + other_bias
        # What every word brings in, (V, 4H), unless those are more words than will probably be said.
        few_words = self._embedding.num_embeddings <= 4 * beams
        self._of_words = self._brought_in(self._embedding.weight) if few_words else None
        self._recurrent = recurrent.t()  # (H, 4H)
        if torch.is_autocast_enabled(self._recurrent.device.type):  # once instead of at each step
            self._recurrent = self._recurrent.to(torch.get_autocast_dtype(self._recurrent.device.type))

    def begin(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """The first input (n, E) -> h and c, (n, H) each, in fp32."""
        enter, _, candidate, leave = self._brought_in(inputs).float().chunk(4, 1)
        memory = enter.sigmoid() * candidate.tanh()
        return leave.sigmoid() * memory.tanh(), memory

    def step(self, words: Tensor, hidden: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """The words said last (n) and h and c -> the next h and c."""
        if self._of_words is not None:
            brought_in = self._of_words.index_select(0, words)
        else:
            brought_in = self._brought_in(self._embedding(words))
        gates = torch.addmm(brought_in, hidden, self._recurrent).float()
        enter, forget, candidate, leave = gates.chunk(4, 1)
        memory = (forget.sigmoid() * memory).addcmul_(enter.sigmoid(), candidate.tanh())
        return leave.sigmoid() * memory.tanh(), memory

    def _brought_in(self, inputs: Tensor) -> Tensor:
        return F.linear(inputs, self._inputs, self._bias)


class _Maps:
    """Where rows look: `LanguageModel.attend` for images with unlike numbers of rows.

    Rows of an image share its map instead of copying it. The hidden layer w . tanh(...) is computed in one piece of
    memory over and over, for as many images at a time as fit, and for as many rows as these have.
    """

    def __init__(self, language_model: LanguageModel, view: View) -> None:
        self._model, self._view = language_model, view
        self._keys = view.keys.float()
        on_cpu = view.features.device.type == "cpu"
        self._most_numbers = NUMBERS_IN_CACHE if on_cpu else NUMBERS_ON_GPU
        self._hidden = view.features.new_empty(0, dtype=torch.float)
        self._place_of_image = torch.arange(len(self._keys))  # in `_view`, by number in the whole batch; on the CPU

    def lay_out(self, image: Tensor) -> None:
        """Say which image each row belongs to. Args: image: (R), rising, on the CPU."""
        image = self._place_of_image[image]
        counts = torch.bincount(image, minlength=len(self._keys))
        going = counts.nonzero().squeeze(1)
        if 2 * len(going) <= len(counts):  # copying the maps of those left costs less than to look at all again
            self._take(going)
            image = torch.searchsorted(going, image)
            counts = counts[going]
        number = torch.arange(len(image)) - (counts.cumsum(0) - counts)[image]  # of the row in its image
        self._slots = int(counts.max())
        full = len(image) == len(counts) * self._slots
        place = image * self._slots + number
        self._place = None if full else place.to(self._keys.device, non_blocking=True)  # in images * slots
        self._groups = []  # of images: the first, the one behind the last, rows of each
        most = max(1, self._most_numbers // max(1, self._slots * self._keys[0].numel()))
        for first, group in enumerate(counts.split(most)):
            if rows := int(group.max()):
                self._groups.append((first * most, first * most + len(group), rows))

    def attend(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """h_{t-1} of the rows (R, H) -> contexts (R, C), without attention (R, 0), and weights (R, P)."""
        model, view = self._model, self._view
        B, P, A = self._keys.shape
        if not model.attends:
            return states[:, :0], states.new_full((len(states), P), 1 / P)
        queries = self._laid_out(model.query(states).float())  # (B, slots, A)
        scores = queries.new_zeros(B, self._slots, P)
        with torch.autocast(states.device.type, enabled=False):
            for first, end, rows in self._groups:
                numbers = (end - first) * rows * P * A
                if self._hidden.numel() < numbers:
                    self._hidden = queries.new_empty(numbers)
                hidden = self._hidden[:numbers].view(end - first, rows, P, A)
                torch.add(self._keys[first:end, None], queries[first:end, :rows, None], out=hidden)
                scores[first:end, :rows] = (hidden.tanh_().flatten(0, 2) @ model.score.float()).view(-1, rows, P)
            weights = model.weights(view, scores)
        contexts = weights.to(view.features.dtype) @ view.features
        return self._rows(contexts), self._rows(weights)

    def _take(self, images: Tensor) -> None:
        """Forget all other images. Args: images: their places in `_view`, on the CPU."""
        where = torch.full((len(self._keys) + 1,), -1)  # the last is where those go that had been forgotten before
        where[images] = torch.arange(len(images))
        self._place_of_image = where[self._place_of_image]
        images = images.to(self._keys.device)
        self._view = View(*(part.index_select(0, images) for part in self._view))
        self._keys = self._view.keys.float()

    def _laid_out(self, rows: Tensor) -> Tensor:
        """(R, n) -> (B, slots, n), zero where there is no row."""
        if self._place is not None:
            rows = rows.new_zeros(len(self._keys) * self._slots, rows.shape[1]).index_copy_(0, self._place, rows)
        return rows.view(len(self._keys), self._slots, -1)

    def _rows(self, laid_out: Tensor) -> Tensor:
        """(B, slots, n) -> (R, n)."""
        rows = laid_out.flatten(0, 1)
        return rows if self._place is None else rows.index_select(0, self._place)
