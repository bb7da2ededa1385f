# %% [markdown]
# # SRPO beside its abstract, step by step
#
# Read this with the paper open ([arXiv 2605.07274](https://arxiv.org/abs/2605.07274)). GRPO gives every token of a
# response the same advantage. SRPO gives each token its own: tokens that describe the image count more where they
# depend on the image, and tokens that reason count more where they follow from that description.
#
# This project knows the abstract alone. So each step names the clause it was read from, shows the line of `srpo.py`
# that does it, and says what to look for in the paper. Everything is computed here by the project's own functions,
# with the built-in tiny model, which has learned to describe simple images and still sees things that are not there.
#
# | sign | meaning |
# |---|---|
# | q, I, Ĩ | the question, its image, and the same image corrupted |
# | p, ∅ | the perception of a response, and the same with its text hidden |
# | oₜ | a token of a response that the policy π sampled |
# | A, Âₜ | the advantage of a response, and that of one of its tokens |
# | Δₜ, b, wₜ | the contrast of a token in nats, the baseline of its response, its weight |
#
# To run it: `pip install matplotlib scipy notebook`. `python extras/notebook.py` makes it from `walkthrough.py`.

# %%
# ruff: noqa: E402, E501
# %matplotlib inline
import sys
from pathlib import Path

here = Path.cwd()
if here.name != "extras":
    here = here / "extras"
sys.path[:0] = [str(here.parent), str(here)]

import credit
import distribution
import numpy as np
import pictures
import readings
import study
import study_tables
import torch
import transformers
import walk
from IPython.display import Image, display
from pictures import Token
from walk import show

import srpo
import train
from corrupt import CORRUPTIONS, corrupt
from data import CELLS
from srpo import Role

transformers.utils.logging.disable_progress_bar()
torch.set_num_threads(1)  # more gain nothing with so small a model

# %% [markdown]
# ## 1. A question, its image, eight responses (step 1)
#
# > "final-answer rewards are typically assigned at the sequence level"
#
# The policy answers each question eight times. A verifier gives every response a reward: 0.9 for a right answer, and
# 0.1 for the form. The advantage compares the reward with those of the same group:
#
# $$A_i = \frac{r_i - \operatorname{mean}_j r_j}{\operatorname{std}_j r_j + \varepsilon}$$

# %%
args = train.resolve_options(["--device", "cpu"])
policy = credit.warmed_up(args)  # half a minute the first time; then it is kept in ~/.cache/srpo
examples = train.build_task(args).train_batch(0, args.prompts)
batch = credit.sample(policy, examples, args, step=1)  # eight responses to each question
show("step 1", srpo.group_advantages)

# %%
group, right, wrong = walk.first_group(batch, args.group_size)
example = walk.example_of(batch, right)
image = policy.fit(example.images[0])
cells = np.array(CELLS).reshape(3, 3)
display(pictures.image_grids([("", image, cells)], image.width // 3))
print(f"{example.question} (right answer: {example.answer})")
print("In the image:", ", ".join(str(fact) for fact in example.scene))
print("\nreward      A   perception (* made up), and the answer")
for row in group:
    print(f"{batch.verdicts[row].reward:6.2f}  {batch.A[row]:+.2f}  {walk.in_short(batch, row)}")

# %% [markdown]
# Each response states what is in the cells, reasons about it and answers. What GRPO makes of it is the same number for
# every token, whether it saw, reasoned or made something up. The first right response is followed from here on, though
# two of its shapes are made up: what becomes of such words is the question of section 5.

# %%
texts, roles = walk.tokens_of(batch, right)
tokens = [Token(text, Role.OTHER, numbers=(f"{batch.A[right]:+.2f}",)) for text in texts]
display(pictures.token_picture(tokens, "A right response as GRPO sees it: A under every token"))

# %% [markdown]
# **In the paper, look for** whether the advantage is divided by the standard deviation, and by which one; how many
# responses a group has; what the reward gives for the form alone. Here: `srpo.group_advantages`, `--group-size`,
# `--reward`.
#
# ## 2. The corrupted image
#
# > "visual dependency under original versus corrupted visual inputs"
#
# To see whether a word depends on the image, the same word is scored under an image that says less. The abstract does
# not say which. Here are the six corruptions of `corrupt.py`, at three strengths.

# %%
STRENGTHS = (0.3, 0.6, 1.0)
table = []
for kind in CORRUPTIONS:
    shown = [corrupt(image, kind, patch=policy.patch, p=p, seed=0) for p in STRENGTHS]
    table.append((f"{kind}\n{walk.WHAT[kind]}", [image, *shown]))
display(pictures.image_table(table, ["original", *(f"p = {p}" for p in STRENGTHS)]))

# %% [markdown]
# The default is the patch mask with p = 0.6, as in PAPO (arXiv 2507.06448). The model joins 2 × 2 patches into one
# visual token. A mask of single patches therefore seldom hides a visual token, or leaves it, whole:

# %%
masked = train.corrupted_copies(batch.examples, policy, args, step=1)  # as in the first step
corrupted = masked[int(batch.rollout.prompt[right])].images[0]
hit = walk.hit_patches(image, corrupted, policy.patch)
before = ("nine visual tokens", image, [[""] * 3] * 3)
after = ("how many of 4 patches are hidden", corrupted, hit)
display(pictures.image_grids([before, after], policy.factor))

# %% [markdown]
# **In the paper, look for** which corruption, how strong it is, whether its squares are patches or visual tokens, and
# how often it is drawn: here once for each question and step, and shared by the group. Options: `--corruption`,
# `--corruption-p`.
#
# ## 3. Roles (and step 9)
#
# > "structured responses are decomposed into perception tokens for extracting visual evidence and reasoning tokens for
# > deriving answers from that evidence"
#
# Tokens inside the first pair of tags perceive, those inside the second reason. Tags, the answer and EOS have no role
# and keep GRPO's advantage.

# %%
tokens = [Token(text, Role(role)) for text, role in zip(texts, roles, strict=True)]
display(pictures.token_picture(tokens, "A response of the tiny model"))

# %% [markdown]
# The tokenizer of a real model does not respect the tags. The following pieces are written out by hand, as the
# byte-level tokenizer of Qwen2-VL splits this text; the tokenizer is not part of the project. A token that shares a
# visible character with the inside of a block has the role of the block, so that ">a" is a perception token.

# %%
PIECES = ["<", "per", "ception", ">a", " red", " dot", "</", "per", "ception", "><", "reason"]
PIECES += ["ing", ">", "so", " one", "</", "reason", "ing", "><", "answer", ">", "1"]
PIECES += ["</", "answer", ">"]
roles = walk.roles_of_pieces(PIECES)
display(walk.pieces_picture(PIECES, roles, "Qwen's own splitting"))
assert roles[PIECES.index(">a")] == Role.PERCEPTION

# %% [markdown]
# A response that lacks a tag has no roles at all, and step 9 leaves it to GRPO: every weight is 1.

# %%
broken = [piece for t, piece in enumerate(PIECES) if t not in (6, 7, 8)]  # without "</perception"
roles = walk.roles_of_pieces(broken)
display(walk.pieces_picture(broken, roles, "The same without </perception>"))
contrasts = torch.randn(1, len(broken))
print("weights:", srpo.token_weights(contrasts, roles[None]).unique().tolist())
show("step 9", srpo.token_weights)

# %% [markdown]
# **In the paper, look for** the names of the tags; whether the answer counts as reasoning (here it has no role); what
# becomes of malformed responses. Here: `srpo.Tags`, `srpo.token_roles`, the last lines of `srpo.token_weights`.
#
# ## 4. One response in three contexts (steps 2 to 4)
#
# > "SRPO assigns role-specific credit by using self-distilled on-policy contrasts"
#
# The policy that wrote the response scores it again, twice: with the corrupted image, and with the original image but
# with the text of its perception hidden. No other model takes part ("self-distilled"), and the tokens are its own
# ("on-policy"). How much less likely a token becomes is its contrast.
#
# **Perception**: "emphasized according to their visual dependency under original versus corrupted visual inputs"
#
# $$\Delta_t = \log\pi(o_t \mid I, q, o_{<t}) - \log\pi(o_t \mid \tilde I, q, o_{<t})$$

# %%
logp = batch.rollout.logp  # [B, T], as sampled
logp_corrupted = credit.corrupted_log_probs(policy, batch, args, step=1)
logp_blank = credit.blank_log_probs(policy, batch, args)
delta = srpo.contrast_scores(logp, logp_corrupted, logp_blank, batch.roles)
show("step 2", srpo.contrast_scores)

# %% [markdown]
# **Reasoning**: "emphasized according to their consistency with the generated perception"
#
# $$\Delta_t = \log\pi(o_t \mid I, q, p, R_{<t}) - \log\pi(o_t \mid I, q, \varnothing, R_{<t})$$
#
# where p is the perception, R the reasoning, and ∅ a perception whose text is hidden while its tags stay (but for a
# character of a tag that shares a token with the text). This project adds step 4: contrasts are limited to ±5 nats. For
# the tiny model that is no rare case: half of the reasoning tokens and a sixth of the perception tokens lie there.

# %%
show("step 3", srpo.contrast_scores)
show("step 4", srpo.contrast_scores)
texts, roles = walk.tokens_of(batch, right)
title = "A right response. x: under the corrupted image (blue), without the perception (orange)"
sampled = logp[right, : len(texts)].tolist()
compared = walk.other_context(batch, right, logp_corrupted, logp_blank)
display(pictures.two_contexts(texts, roles, sampled, compared, title))

# %% [markdown]
# The longer a bar, the more the token needs what was taken away. A bar that goes down from the black dot to the cross
# is a positive contrast. A bar that goes up is a negative one: under the corrupted image the word had been *more*
# likely. In the reasoning, the words that say how the list goes on need the perception most: the names of the cells
# here, `so`, which ends the list, and the result. A color behind the name of its cell needs it little.
#
# **In the paper, look for** what is made of the two probabilities: the log-ratio of the sampled token as here, its
# absolute value, or a divergence over all words; whether the perception is hidden, removed or replaced, and which
# image goes with it; whether contrasts are limited. Here: `--weights extras/readings.py:absolute` or `:k3`,
# `srpo.without_perception`, `max_abs=` of `srpo.contrast_scores`.
#
# ## 5. Baseline, weights, advantages (steps 5 to 7)
#
# > "These role-specific signals are further unified through a shared trajectory-level baseline"
#
# $$b = \operatorname{mean}_{t \in S} \Delta_t \qquad \text{(step 5)}$$
#
# > "yielding positive token weights that adjust relative update magnitudes"
#
# $$\tilde w_t = \exp\,\Big[\frac{\Delta_t - b}{\tau}\Big]_{\log w_{\min}}^{\log w_{\max}}
# \qquad w_t = \frac{\tilde w_t}{\operatorname{mean}_{s \in S} \tilde w_s} \qquad \text{(step 6)}$$
#
# > "while preserving the original GRPO reward and optimization direction"
#
# $$\hat A_t = A\,((1 - \lambda) + \lambda w_t) \qquad \text{(step 7)}$$
#
# The brackets limit the exponent to the two logarithms. S is the set of all tokens with a role. By default τ = 1, the
# limits are 0.8 and 1.2, and λ = 1.

# %%
show("step 5", srpo.shared_baseline)
show("step 6", srpo.token_weights)
show("step 7", srpo.role_aware_advantages)
w = srpo.token_weights(delta, batch.roles, tau=args.tau, w_min=args.w_min, w_max=args.w_max)
A_hat = srpo.role_aware_advantages(batch.A, w, args.lam)
display(walk.credit_bars(batch, right, delta, w, A_hat, "A right response; hatched: made up"))
display(walk.credit_bars(batch, wrong, delta, w, A_hat, "A wrong response; hatched: made up"))

# %% [markdown]
# In the right response a word with a weight above 1 is praised more than under GRPO, in the wrong one it is blamed
# more. What happens to the words that were made up? Below, over the whole batch, the words for a color or a shape in
# the perception:

# %%
for (sign, word), numbers in walk.words(batch, delta, w, A_hat).items():
    means = "Δ {:.2f}, w {:.2f}, A {:+.2f}, Â {:+.2f}".format(*numbers.mean(dim=0).tolist())
    print(f"{sign}, {word:8} {len(numbers):4} words: mean {means}")

# %% [markdown]
# A made-up word has the lower contrast: the image does not speak for it. Where A is positive that is as one would
# wish, since the word is praised less than a true one (on average: in the two responses above the made-up square has
# a higher contrast than the true triangles). Where A is negative the same low weight means that it is
# *blamed less*, although it may be what went wrong. The sign of A decides the direction, as the abstract says; the
# weight knows nothing of it. And the difference is small: on average true words weigh less than 1 as well, a few
# percent more than made-up ones. The large contrasts belong to the names of the cells in the perception, and in the
# reasoning to "no", "so" and the result.
#
# ### The honest part: how much of the contrast arrives
#
# Between the limits 0.8 and 1.2 there is room for (Δ − b)/τ from −0.22 to 0.18. Contrasts are much larger than that.

# %%
scored = readings.scored_tokens(delta, batch.roles)
near = distribution.relative(delta, batch.roles, args.tau)
values = {}
for role in (Role.PERCEPTION, Role.REASONING):
    values[role] = near[scored & (batch.roles == role)].tolist()
limits = np.log([args.w_min, args.w_max])
display(pictures.histogram(values, limits, "(Δ − b)/τ, all tokens with a role of the batch"))
print("share of the weights at a limit, by range and tau:")
for w_min, w_max in ((0.8, 1.2), (0.5, 2.0), (0.1, 10.0)):
    print(f"[{w_min}, {w_max}]".ljust(13), end="")
    for tau in (0.3, 1, 3, 10):
        share = distribution.share_at_limit(near[scored] * args.tau / tau, w_min, w_max)
        print(f"tau {tau}: {share:4.0%}", end="     ")
    print()

# %% [markdown]
# So with the default w̃ is in effect one of two values, by the sign of Δ − b; the division by its mean then gives the
# weights of the pictures, from 0.77 to 1.31. With a wider range or a larger τ
# the size of the contrast arrives as well; in the study of section 8 that did not help.
#
# What if a model reads well and sees little? No pretrained vision-language model has been measured. Below, the same
# figures of a language model of 135 million parameters
# (SmolLM2) behind a new vision tower, after a cold start on the same task. It writes the form, and does not use its
# vision tower yet. Its weights are not part of the project: the figures were measured once, by
#
# ```sh
# python train.py --model FOLDER --warmup-steps 60 --steps 0 --image-size 112 \
#     --max-new-tokens 96 --out out/smol  # ends after 20 steps: all of 16 responses have the form
# python extras/distribution.py --model out/smol/warmed-up --prompts 8 --max-new-tokens 128
# ```

# %%
tiny = distribution.figures(batch, logp_corrupted, logp_blank, args)
print(f"{'':38}{'tiny':>8}{'135M':>8}")
for name, value in tiny.items():
    print(f"{name:38}{value:8.2f}{distribution.REAL_135M[name]:8.2f}")
rows = []
for model, found in (("tiny", tiny), ("135M", distribution.REAL_135M)):
    for name, role in distribution.ROLES.items():
        low, middle, high = [found[f"delta of {name}, {percent} %"] for percent in (5, 50, 95)]
        rows.append((f"{model}, {name}", low, middle, high, pictures.COLORS[role]))
display(pictures.intervals(rows, "contrast in nats: 5 %, median, 95 % of the tokens", height=0.4))

# %% [markdown]
# The language model reads its own perception, so its reasoning has large contrasts. It hardly looks at the image, so
# its perception has contrasts near 0. One baseline for both lies between them: nearly all perception tokens fall below
# it and get the lower limit. While perception is not grounded, the shared baseline takes credit *from* it, the
# opposite of what the method is for. And weights above 1 go to tokens of which the policy is surer already (their
# entropy is about half that of the others, in both models), where there is less left to learn.
#
# **In the paper, look for** exactly this: whether the baseline is a mean over tokens, over roles or over the group;
# whether contrasts are standardized first; which limits and which τ; how the mean weights of the two roles develop in
# training (here they are logged as `w_perception` and `w_reasoning`); and how well the models perceived at the start.
# Here: `--tau`, `--w-min`, `--w-max`, `--lam`, `--weights extras/readings.py:role_balanced` or `:role_standardized`.
#
# ## 6. The loss (step 8)
#
# > "refines the sequence-level GRPO advantage into role-aware token-level advantages without changing the reward
# > function"
#
# $$\mathcal L = -\frac{1}{\sum_i |o_i|}\sum_{i,t}
# \min\big(\rho_t \hat A_t,\ \operatorname{clip}(\rho_t,\ 1 - \varepsilon,\ 1 + \varepsilon)\,\hat A_t\big),
# \qquad \rho_t = \frac{\pi_\theta(o_t \mid \dots)}{\pi_{\text{old}}(o_t \mid \dots)}$$
#
# It is GRPO's loss with $\hat A_t$ in the place of A. First the two promises of the weights, by numbers.

# %%
show("step 8", srpo.policy_loss)
used = batch.A.nonzero()[:, 0]  # responses without advantage teach nothing
part = batch[used]
advantages = A_hat[used]  # [B, T]
A = part.A[:, None].expand_as(advantages)
mask = part.rollout.mask
same_sign = torch.sign(advantages)[mask] == torch.sign(A)[mask]
moved = ((advantages - A) * mask).sum(dim=1).abs().max()
print(f"tokens whose sign is that of A: {same_sign.float().mean():.0%}")
print(f"largest change of a response's summed advantage: {moved:.0e}, by rounding")
print(f"tokens whose advantage is not GRPO's: {(advantages != A)[mask].float().mean():.0%}")

# %% [markdown]
# Clipping acts where the ratio has left 1 ± 0.2 in the direction that the advantage pushes. In the first optimizer
# step on a batch the ratio is 1 everywhere, so nothing is clipped and the loss is minus the mean advantage. Only
# further inner epochs on the same batch (`--inner-epochs`) move it:

# %%
pupil = credit.warmed_up(args)
optimizer = torch.optim.AdamW(train.trainable(pupil, args), lr=5 * args.lr, weight_decay=0.0)
old_logp = pupil.log_probs(part.prompts, part.rollout, args.temperature).detach()
print("inner epoch      loss   clipped: SRPO   with GRPO's A   mean ratio")
for epoch in range(1, 6):
    logp_now = pupil.log_probs(part.prompts, part.rollout, args.temperature)
    loss, stats = srpo.policy_loss(logp_now, old_logp, advantages, mask)
    _, grpo_stats = srpo.policy_loss(logp_now, old_logp, part.A, mask)
    clipped = f"{stats['clip_frac']:13.2%} {grpo_stats['clip_frac']:15.2%}"
    print(f"{epoch:11} {loss.item():9.4f}   {clipped}   {stats['ratio']:10.4f}")
    assert stats["clip_frac"] == grpo_stats["clip_frac"]
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()

# %% [markdown]
# (With five times the usual learning rate, to make it visible; the loss rises at first because that overshoots.) A
# positive weight can be taken out of the minimum:
# $\min(\rho\,wA, \operatorname{clip}(\rho)\,wA) = w \min(\rho A, \operatorname{clip}(\rho) A)$. So the very same
# tokens are clipped as under GRPO; the weight only scales the slope.

# %%
display(pictures.surrogate((0.8, 1.0, 1.2), clip=0.2))

# %% [markdown]
# **In the paper, look for** over what the loss is averaged (here: all response tokens of the step), the clip range, a
# KL term, and the number of inner epochs. Here: `denominator=` of `srpo.policy_loss`, `--clip-low`, `--clip-high`,
# `--kl-coef`, `--inner-epochs`.
#
# ## 7. Change the reading
#
# Section 5 showed a made-up word in a wrong response with *less* blame. One could turn the emphasis round where A <
# 0, so that what the image does not speak for is blamed more, as RLSD does (arXiv 2604.03128). A function with the
# arguments below is all that `--weights` takes:


# %%
def turned_round(logp, logp_corrupted, logp_blank, roles, A, *, tau, w_min, w_max, **_):
    """SRPO where A > 0; where A < 0, low contrasts weigh more."""
    delta = srpo.contrast_scores(logp, logp_corrupted, logp_blank, roles)
    delta = torch.where(A[:, None] < 0, -delta, delta)
    return srpo.token_weights(delta, roles, tau=tau, w_min=w_min, w_max=w_max)


keywords = {"tau": args.tau, "w_min": args.w_min, "w_max": args.w_max}  # as the loop gives them
logps = (logp, logp_corrupted, logp_blank)
w_turned = turned_round(*logps, batch.roles, batch.A, **keywords)
assert torch.equal(w_turned, readings.sign_aware(*logps, batch.roles, batch.A, **keywords))
A_turned = srpo.role_aware_advantages(batch.A, w_turned, args.lam)
display(walk.credit_bars(batch, right, delta, w_turned, A_turned, "The right response: as before"))
display(
    walk.credit_bars(
        batch, wrong, delta, w_turned, A_turned, "The wrong response: the emphasis is turned round"
    )
)

# %% [markdown]
# Saved in a file, it is trained with `python train.py --weights my.py:turned_round` (the file then needs `import
# torch, srpo`). It looks like a repair. With the wider limits 0.5 and 2 it is the reading that does most harm in the
# study (`sign_aware=true`; `--w-min 0.5 --w-max 2` repeats it). In RLSD's narrow form, which also fades out, no harm
# can be shown (`rlsd`), and at the default limits the function above is not part of the study. One possible cause: a
# word with a low contrast that all responses of a group share is then blamed more than it is praised, so it is pushed
# down whatever the rewards.
#
# **In the paper, look for** whether negative advantages are treated like positive ones. `extras/readings.py` has this
# and the other readings, controls and relatives, each about ten lines with a test.
#
# ## 8. Does it learn, does it help?
#
# `grounded` is the share of answers that are right and whose evidence is stated rightly, `wrong reason` that of answers
# right without it. `range-0.5-2` is SRPO with the limits 0.5 and 2, and `shuffled` has those weights at random places.
#
# Curves of the task `count`: means over ten seeds, and bands of 95 % of the error of the mean, made at commit 1f8abce
# by `study.py --tasks count`. All conditions start from the same models and see the same questions. Seeds differ more
# than conditions, so the bands overlap; the paired differences further below are sharper.

# %%
display(Image(filename=str(here / "curves-count.png"), width=900))

# %% [markdown]
# The study has three tasks and up to ten seeds for each condition. Runs are paired by task and seed; below is the
# difference of each condition to GRPO in accuracy after 40 steps, with its 95 % interval. `range-0.5-2` is SRPO with
# wider limits; all below it, but for softmax and rlsd, have these as well, so that they are to be compared with
# `range-0.5-2` and not with 0. Beside that, only softmax and the readings that depend on the sign of A stand out. Black
# rows have 30 pairs, grey ones 15 (blur, shuffle and standardized 30); dots are interquartile means, and the intervals
# are not corrected for the number of comparisons.

# %%
recorded = study.read(here / "study.csv")
part = study_tables.Part([r for r in recorded if r["regime"] == "default" and r["seed"] < 10])
rows = []
for condition in part.others:
    apart = part.differences(condition, "accuracy")  # of each task, of all seeds
    low, high = study_tables.bounds(apart)
    color = "black" if condition in study.MAIN else "#8a8a8a"
    rows.append((condition, low, study_tables.iqm(*apart), high, color))
title = "accuracy minus GRPO's, same task and seed"
display(pictures.intervals(rows, title, limits=(-0.1, 0.06), height=0.21))

# %% [markdown]
# With the default limits, no difference between SRPO and GRPO can be shown. Wider limits cost accuracy, and the same
# weights shuffled over the tokens of each response cost about as much. With those limits, readings in which the
# emphasis depends on the sign of A ruin training. No reading is better than GRPO on seeds 10 to 19, kept for that
# question.
#
# On `count`, the task with most grounding, SRPO is grounded less often than GRPO in the curves above: over ten pairs
# by 0.037, with a standard error of 0.022. Ten seeds do not settle it; nothing points to the gain that the abstract
# reports.
#
# All this is about a tiny model on drawn tasks; no vision-language model with real weights has been trained with it.
# Of the nearest relative there are figures of real models. Averaged over the five benchmarks in the table of CEPO
# (README of [ahmedheakl/CEPO](https://github.com/ahmedheakl/CEPO)), RLSD, which also weighs tokens by a contrast of
# the policy with itself, has 40.97 beside GRPO's 41.17 (our mean of the five; the table prints 40.05 for RLSD) for a
# model of 2 billion parameters, and 58.51 beside 57.43 for one of 4 billion.
#
# **In the paper, look for** the number of seeds and the spread of the results; whether GRPO had the same reward, the
# same format and the same number of steps; a control with shuffled weights; and whether what improved is the accuracy
# or the grounding of the answers.
