# %% [markdown]
# # SRPO beside its abstract, step by step
#
# Read this with the paper open ([arXiv 2605.07274](https://arxiv.org/abs/2605.07274)). GRPO gives every token of a
# response the same advantage. SRPO gives each token its own: tokens that describe the image count more where they
# depend on the image, and tokens that reason count more where they follow from that description.
#
# This project knows the abstract alone. So each step names the clause it was read from, shows the line of `srpo.py`
# that does it, and says what to look for in the paper; section 9 has all of these questions in one table. Everything is
# computed here by the project's own functions, with the built-in tiny model, which has learned to describe simple
# images and still sees things that are not there.
#
# | sign | meaning |
# |---|---|
# | Q, I, Ĩ | the question, its image, and the same image corrupted, with strength p |
# | P, R, ∅ | the perception and the reasoning of a response; a perception whose text is hidden |
# | oₜ | a token of a response that the policy π sampled |
# | r, ε | the reward of a response, and a small number that keeps the division by its deviation finite |
# | A, Âₜ | the advantage of a response, and that of one of its tokens |
# | Δₜ, b, wₜ | the contrast of a token in nats, the baseline of its response, its weight |
# | S, τ, λ | the set of tokens with a role, the temperature of their weights, how much of a weight enters Âₜ |
# | ρₜ, c, β | the probability ratio of the loss, how far from 1 it counts, the coefficient of the KL term |
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
import torch
import transformers
import walk
from IPython.display import Image, display
from pictures import Token
from walk import show

import srpo
import train
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
policy = credit.load(args)  # half a minute the first time; then it is kept in ~/.cache/srpo
examples = train.build_task(args).train_batch(0, args.prompts)
batch = credit.sample(policy, examples, args, step=1)  # eight responses to each question
show("step 1", srpo.group_advantages)

# %%
group, right, wrong = walk.first_group(batch, args.group_size)
image = policy.fit(walk.example_of(batch, right).images[0])
cells = np.array(CELLS).reshape(3, 3)
display(pictures.image_grids([("", image, cells)], image.width // 3))
walk.print_group(batch, group)

# %% [markdown]
# Each response states what is in the cells, reasons and answers. What GRPO makes of it is the same number for every
# token, whether it saw, reasoned or made something up. The first right response is followed from here on, though two of
# its shapes are made up: what becomes of such words is the question of section 5.

# %%
texts, roles = walk.tokens_of(batch, right)
tokens = [Token(text, Role.OTHER, numbers=(f"{batch.A[right]:+.2f}",)) for text in texts]
display(pictures.token_picture(tokens, "A right response as GRPO sees it: A under every token"))

# %% [markdown]
# **In the paper, look for** whether the advantage is divided by the standard deviation, and by which one; how many
# responses a group has; what the reward gives for the form alone.
#
# ## 2. The corrupted image
#
# > "visual dependency under original versus corrupted visual inputs"
#
# To see whether a word depends on the image, the same word is scored under an image that says less. The abstract does
# not say which. Here are the six corruptions of `corrupt.py`, those that have a strength p at three of them.

# %%
rows, heads = walk.corrupted_rows(image, policy.patch)
display(pictures.image_table(rows, heads))

# %% [markdown]
# The default is the patch mask with p = 0.6, as in PAPO (arXiv 2507.06448). The model joins 2 × 2 patches into one
# visual token. A mask of single patches therefore seldom hides a visual token, or leaves it, whole:

# %%
masked = train.corrupted_copies(batch.examples, policy, args, step=1)  # as in the first step
corrupted = masked[int(batch.rollout.prompt[right])].images[0]
hit = walk.hit_patches(image, corrupted, policy.patch)
panels = [("nine visual tokens", image, [[""] * 3] * 3), ("patches hidden, of 4", corrupted, hit)]
display(pictures.image_grids(panels, policy.factor))

# %% [markdown]
# **In the paper, look for** which corruption, how strong it is, whether its squares are patches or visual tokens, and
# how often it is drawn: here once for each question and step, and shared by the group.
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
# The tokenizer of a real model does not respect the tags. Below, a text as that of Qwen2-VL splits it, written out by
# hand. A token that shares a visible character with the inside of a block has the role of the block, such as ">a".

# %%
roles = walk.roles_of_pieces(walk.QWEN)
display(walk.pieces_picture(walk.QWEN, roles, "Qwen's own splitting"))
assert roles[walk.QWEN.index(">a")] == Role.PERCEPTION

# %% [markdown]
# A response that lacks a tag has no roles at all, and step 9 leaves it to GRPO: every weight is 1. So is one whose
# perception is empty, or holds white space alone: its reasoning has a role, but there is no perception to compare with.

# %%
broken = [piece for t, piece in enumerate(walk.QWEN) if t not in (6, 7, 8)]  # no "</perception"
display(walk.pieces_picture(broken, walk.roles_of_pieces(broken), "The same without </perception>"))
for name, pieces in (("a tag is missing", broken), ("empty perception", walk.EMPTY)):
    roles = walk.roles_of_pieces(pieces)
    weights = srpo.token_weights(torch.randn(1, len(pieces)), roles[None])
    print(f"{name}: roles {roles.unique().tolist()}, weights {weights.unique().tolist()}")
show("step 9", srpo.token_weights)

# %% [markdown]
# **In the paper, look for** the names of the tags; whether the answer counts as reasoning (here it has no role); what
# becomes of malformed responses.
#
# ## 4. One response in three contexts (steps 2 to 4)
#
# > "SRPO assigns role-specific credit by using self-distilled on-policy contrasts"
#
# The policy that wrote the response scores it again, twice: with the corrupted image, and with the original one but
# with the text of its perception hidden. No other model takes part ("self-distilled"), and the tokens are its own
# ("on-policy"). How much less likely a token becomes is its contrast.
#
# **Perception**: "emphasized according to their visual dependency under original versus corrupted visual inputs"
#
# $$\Delta_t = \log\pi(o_t \mid I, Q, o_{<t}) - \log\pi(o_t \mid \tilde I, Q, o_{<t})$$

# %%
logp = batch.rollout.logp  # [B, T], as sampled
logp_corrupted = credit.corrupted_log_probs(policy, batch, args, step=1)
logp_blank = credit.blank_log_probs(policy, batch, args)
delta = srpo.contrast_scores(logp, logp_corrupted, logp_blank, batch.roles)
show("step 2", srpo.contrast_scores)

# %% [markdown]
# **Reasoning**: "emphasized according to their consistency with the generated perception"
#
# $$\Delta_t = \log\pi(o_t \mid I, Q, P, R_{<t}) - \log\pi(o_t \mid I, Q, \varnothing, R_{<t})$$
#
# where ∅ is a perception whose text is hidden while its tags stay (but for a character of a tag that shares a token
# with the text). This project adds step 4: contrasts are limited to ±5 nats. For the tiny model that is no rare case:
# half of the reasoning tokens and a sixth of the perception tokens lie there.

# %%
show("step 3", srpo.contrast_scores)
show("step 4", srpo.contrast_scores)
texts, roles = walk.tokens_of(batch, right)
sampled = logp[right, : len(texts)].tolist()
compared = walk.other_context(batch, right, logp_corrupted, logp_blank)
title = "A right response in three contexts"
display(pictures.two_contexts(texts, roles, sampled, compared, title))

# %% [markdown]
# The longer a bar, the more the token needs what was taken away. Where the cross lies below the black dot, the contrast
# is positive; where it lies above, the word had been *more* likely under the corrupted image, or without the
# perception. In the reasoning, the words that say how the list goes on need the perception most: the names of the cells here, `so`, which
# ends the list, and the result. A color behind the name of its cell needs it little.
#
# Both passes run without gradient. On two cores of a CPU they make a step 1.20 times as long as GRPO's with 36 visual
# tokens in the prompt, and 1.33 times with 1,024 (`extras/README.md`, "What a step costs"). On a GPU it is not known.
#
# ### A control: what if another perception stands there?
#
# Do words such as `no` need what the perception *says*, or only that one is there? Below, its tokens are replaced by as
# many of another response, to another question (and image) or to the same one, and the reasoning is scored again.

# %%
found = {"hidden": walk.by_kind(batch, delta, torch.ones(len(batch.A)))}
for name, same_question in (("of another question", False), ("of the same question", True)):
    rollout, rows = walk.exchanged(batch, same_question)
    cache = rollout.prompt_cache
    logp_other = train.score(policy, batch.prompts, rollout, args, prompt_cache=cache)
    delta_other = srpo.contrast_scores(logp, logp_corrupted, logp_other, batch.roles)
    found[name] = walk.by_kind(batch, delta_other, rows)
walk.print_kinds(found)

# %% [markdown]
# So the 5 nats of `no` and the 4.8 of `so` are the loss of context: with another perception in its place, whatever it
# says, they all but vanish. In its demonstrations the tiny model has never seen an empty one, and does not know how to
# go on from there. What depends on the content is smaller: with another question's perception, the names of its cells
# (2.4 nats) and the words that match (1.0); with that of another response to the same question, 0.3 nats for `no` and
# for words that match. In a language model of 135 million parameters that has learned to see (section 5), the content
# counts for more: its `no` has 4.8 nats with the perception hidden, 2.4 with another question's, and 0.6 with that of
# another response to the same question.
#
# **In the paper, look for** what is made of the two probabilities (a log-ratio, its absolute value, a divergence over
# all words); whether the perception is hidden, removed or replaced, and with which image; whether contrasts are limited.
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
# $$\hat A_t = A\,\operatorname{sg}[(1 - \lambda) + \lambda w_t] \qquad \text{(step 7)}$$
#
# The brackets limit the exponent to the two logarithms, and sg lets no gradient through. By default τ = 1, the limits
# are 0.8 and 1.2, and λ = 1. First by hand, with made-up log-probs: a right response, without its tags, in a group with
# the rewards 1 and 0.

# %%
show("step 5", srpo.shared_baseline)
show("step 6", srpo.token_weights)
show("step 7", srpo.role_aware_advantages)
role, sampled, with_corrupted, with_blank = walk.BY_HAND.values()
d = srpo.contrast_scores(sampled, with_corrupted, with_blank, role)
b = srpo.shared_baseline(d, role).expand_as(d)
w_tilde = readings.exponential(d - b, tau=1, w_min=0.8, w_max=1.2)
w = srpo.token_weights(d, role)
A = srpo.group_advantages([1, 0], 2)[:1].expand_as(d)
computed = {"Δ": d, "b": b, "w̃": w_tilde, "w": w, "A": A, "Â": srpo.role_aware_advantages(A, w)}
walk.print_rows({**walk.BY_HAND, **computed})

# %% [markdown]
# The image explains "red", the perception "one": these two take a larger share of the same total. ("dot" lies just above
# the baseline, but falls below 1 by the division by the mean of w̃, 1.04.) Now the tiny model:

# %%
w = srpo.token_weights(delta, batch.roles, tau=args.tau, w_min=args.w_min, w_max=args.w_max)
A_hat = srpo.role_aware_advantages(batch.A, w, args.lam)
display(walk.credit_bars(batch, right, delta, w, A_hat, "A right response; hatched: made up"))
display(walk.credit_bars(batch, wrong, delta, w, A_hat, "A wrong response; hatched: made up"))

# %% [markdown]
# In the right response a word with a weight above 1 is praised more than under GRPO, in the wrong one it is blamed
# more. What happens to words that were made up? Below, all words for a color or a shape in the perceptions of the batch:

# %%
for (sign, word), numbers in walk.words(batch, delta, w, A_hat).items():
    means = "Δ {:.2f}, w {:.2f}, A {:+.2f}, Â {:+.2f}".format(*numbers.mean(dim=0).tolist())
    print(f"{sign}, {word:8} {len(numbers):4} words: mean {means}")

# %% [markdown]
# A made-up word has the lower contrast: the image does not speak for it. Where A is positive that is as one would
# wish, since the word is praised less than a true one (on average: in the two responses above the made-up square has
# a higher contrast than the true triangles). Where A is negative the same low weight means that it is *blamed less*,
# although it may be what went wrong. The sign of A decides the direction, as the abstract says; the
# weight knows nothing of it. And the difference is small: on average true words weigh less than 1 as well, a few
# percent more than made-up ones. The large contrasts belong to the names of the cells in the perception, and in the
# reasoning to "no", "so" and the result.
#
# ### The honest part: how much of the contrast arrives
#
# Between the limits 0.8 and 1.2 there is room for (Δ − b)/τ from −0.22 to 0.18. Contrasts are much larger than that. In
# the picture the bars of the two roles are stacked, and the outermost bars hold all that lies further out.

# %%
scored = readings.scored_tokens(delta, batch.roles)
near = distribution.relative(delta, batch.roles, args.tau)
both = (Role.PERCEPTION, Role.REASONING)
values = {role: near[scored & (batch.roles == role)].tolist() for role in both}
room = np.log([args.w_min, args.w_max])
display(pictures.histogram(values, room, "(Δ − b)/τ, all tokens with a role of the batch"))
walk.print_shares(near[scored] * args.tau)

# %% [markdown]
# So with the default w̃ is in effect one of two values, by the sign of Δ − b; the division by its mean then gives the
# weights of the pictures, from 0.77 to 1.31. With wider limits or a larger τ the size of the contrast arrives as well;
# in the study of section 8 that did not help.
#
# What of a model that reads well? No pretrained vision-language model has been measured. Below, the same figures of a
# language model of 135 million parameters (SmolLM2) behind a new vision tower, after two cold starts on the same task.
# The short one taught it the form alone, so that it is blind. The long one trained the vision tower, too, and it sees:
# 88 % of its answers are right (`extras/README.md`, "A real language model", has the commands). Its weights are not
# part of the project, so the figures were measured once.

# %%
tiny = distribution.figures(batch, logp_corrupted, logp_blank, args)
models = {"tiny": tiny, "135M, blind": distribution.REAL_135M}
models["135M, sees"] = distribution.REAL_135M_SEEING
walk.print_figures(models)
rows = walk.spreads(models)
display(pictures.intervals(rows, "contrast in nats: 5 %, median, 95 % of the tokens", height=0.4))

# %% [markdown]
# The blind model reads its own perception, so its reasoning has large contrasts; its perception has contrasts near 0.
# One baseline for both lies between them: nearly all perception tokens fall below it and get the lower limit. While
# perception is not grounded, the shared baseline takes credit *from* it, the opposite of what the method is for. Once
# the model sees, a few words of the perception, those that the image decides, reach 5 nats, and the mean weight of the
# perception rises from 0.89 to 0.97; most other words still lie near 0. And in all three models weights above 1 go to
# tokens of which the policy is more certain already (their entropy is two fifths to two thirds of the others'), where there
# is less left to learn.
#
# **In the paper, look for** exactly this: over what the baseline is a mean; whether contrasts are standardized first;
# which limits and which τ; whether the weights are normalized, and to what; how the mean weights of the two roles
# develop in training (here they are logged as `w_perception` and `w_reasoning`); and how well the models perceived at
# the start.
#
# ## 6. The loss (step 8)
#
# > "refines the sequence-level GRPO advantage into role-aware token-level advantages without changing the reward
# > function"
#
# $$\mathcal L = -\frac{1}{\sum_i |o_i|}\sum_{i,t}
# \min\big(\rho_t \hat A_t,\ \operatorname{clip}(\rho_t,\ 1 - c,\ 1 + c)\,\hat A_t\big)
# + \beta\,\frac{1}{\sum_i |o_i|}\sum_{i,t} \big(u_t - 1 - \log u_t\big)$$
#
# $$\rho_t = \frac{\pi_\theta(o_t \mid \dots)}{\pi_{\text{old}}(o_t \mid \dots)}
# \qquad u_t = \frac{\pi_{\text{ref}}(o_t \mid \dots)}{\pi_\theta(o_t \mid \dots)}$$
#
# It is GRPO's loss with $\hat A_t$ in the place of A. The last term estimates the KL divergence from the initial policy
# π_ref; it is the same for every role, and by default β = 0 (`--kl-coef`), so that it is absent below. First the two
# promises of the weights, by numbers.

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
# Clipping acts where the ratio has left 1 ± c, by default 1 ± 0.2, in the direction that the advantage pushes. In the
# first optimizer step on a batch the ratio is 1 everywhere, so nothing is clipped and the loss is minus the mean
# advantage. Only further inner epochs on the same batch (`--inner-epochs`) move it:

# %%
pupil = credit.load(args)
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
# (With five times the usual learning rate, to make it visible; the loss rises at first because that overshoots.) The
# very same tokens are clipped as under GRPO, since a positive weight can be taken out of the minimum; it only scales
# the slope: $\min(\rho\,wA, \operatorname{clip}(\rho)\,wA) = w \min(\rho A, \operatorname{clip}(\rho) A)$.

# %%
display(pictures.surrogate((0.8, 1.0, 1.2), clip=0.2))

# %% [markdown]
# **In the paper, look for** over what the loss is averaged (in training: all response tokens of the step, also those of
# responses without advantage), the clip range, a KL term, and the number of inner epochs.
#
# ## 7. Change the reading
#
# Section 5 showed a made-up word in a wrong response with *less* blame. One could turn the emphasis round where A < 0,
# so that what the image does not speak for is blamed more, as RLSD does (arXiv 2604.03128). A function such as this is
# all that `--weights` takes. The right response keeps the weights of section 5; the picture shows the wrong one.


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
display(walk.credit_bars(batch, wrong, delta, w_turned, A_turned, "Wrong response, turned round"))

# %% [markdown]
# Saved in a file that imports `torch` and `srpo`, it is trained with `python train.py --weights my.py:turned_round`. It
# looks like a repair, and the study does not bear it out:
#
# | limits | what came of it |
# |---|---|
# | 0.5 and 2 | more harm than any other reading |
# | 0.8 and 1.2, fading out as in RLSD | no harm can be shown |
# | 0.8 and 1.2, to the end | not known: five runs on `count` end 0.052 below GRPO's accuracy, [−0.152, 0.049] |
#
# One possible cause: a word with a low contrast that all responses of a group share is then blamed more than it is
# praised, so it is pushed down whatever the rewards.
#
# **In the paper, look for** whether negative advantages are treated like positive ones.
#
# ## 8. Does it learn, does it help?
#
# `grounded` is the share of answers that are right and whose evidence is stated rightly, `wrong reason` that of answers
# right without it. `range-0.5-2` is SRPO with the limits 0.5 and 2, and `shuffled` has those weights at random places.
# All conditions start from the same models and see the same questions, so that runs of one seed are compared in pairs.
#
# Task `count`, ten seeds, 256 questions: means, and below them the paired differences to GRPO with 95 % intervals. The
# limits 0.5 and 2 cost accuracy and grounding from the first steps on. The accuracy of SRPO cannot be told from GRPO's;
# at the end it is grounded less often, by 0.052 [0.003, 0.100], and by 0.037 [−0.014, 0.087] on the 512 questions of the
# last evaluation in `study.csv`. Ten seeds do not settle that; nothing points to the gain that the abstract reports.
# (Commit 6a12259: `study.py --tasks count --conditions grpo,srpo,range-0.5-2,shuffled`, then `report.py --curves`.)

# %%
display(Image(filename=str(here / "curves-count.png"), width=900))

# %% [markdown]
# The study has three tasks and up to ten seeds for each condition. Below is the difference of each condition to GRPO
# after 40 steps, with its 95 % interval; dots are interquartile means, and nothing is corrected for the number of
# comparisons. Black rows have 30 pairs, grey ones the 15 of seeds 0 to 4. Rows under "Limits 0.5 and 2" are to be
# compared with SRPO at those limits (`range-0.5-2`) instead of with 0. The two vertical lines mark its value: compare a
# black row with the black line, and a grey row with the grey one. `extras/study_conditions.py` says more of each row.

# %%
recorded = study.read(here / "study.csv")
display(walk.study_picture(recorded))
for condition in ("srpo", "range-0.5-2", "shuffled"):
    print(f"{condition:12}  {walk.study_line(recorded, condition)}")

# %% [markdown]
# With the default limits, no difference between SRPO and GRPO can be shown. The intervals rule out that SRPO gains more
# than 0.006 in accuracy or in grounding, or that it loses more than 0.013 in accuracy or 0.019 in grounding; smaller
# effects they cannot tell from none. With the limits 0.5 and 2, accuracy falls by 0.011 to 0.029, and the same weights
# shuffled over the tokens of each response cost about as much. Readings in which the emphasis depends on the sign of A
# ruin training there, and no row lies above the lines with its whole interval. On seeds 10 to 19, kept for the question
# of what helps, nothing is better than GRPO.
#
# All this is about a tiny model on drawn tasks; no pretrained vision-language model has been trained with it. What RL
# made of the 135M model that sees is in `extras/README.md`: more right answers, with SRPO and with GRPO, and neither by
# seeing more. Of the nearest relative there are figures of real models. Averaged over the five benchmarks in the table of CEPO
# (README of [ahmedheakl/CEPO](https://github.com/ahmedheakl/CEPO)), RLSD, which also weighs tokens by a contrast of
# the policy with itself, has 40.97 beside GRPO's 41.17 (our mean of the five; the table prints 40.05 for RLSD) for a
# model of 2 billion parameters, and 58.51 beside 57.43 for one of 4 billion.
#
# **In the paper, look for** the number of seeds and the spread of the results; whether GRPO had the same reward, form
# and steps; a control with shuffled weights; and whether what improved is the accuracy or the grounding of the answers.
#
# ## 9. With the paper open
#
# All questions to the paper in one place, with what was chosen here. The numbers of the steps are this project's.
#
# | step | **In the paper, look for** | here | to change it |
# |---|---|---|---|
# | 1 | whether A is divided by the standard deviation, and by which; how large a group is | the sample one; 8 | `group_advantages`, `--group-size` |
# | 1 | what the reward gives for the form alone | 0.1, in sixths for each tag in place | `--reward` |
# | 2 | which corruption, how strong, of patches or of visual tokens, how often drawn | patches of the vision encoder masked, p = 0.6, once per prompt and step | `--corruption`, `--corruption-p` |
# | 2 | what is made of the two probabilities; or of the two distributions over all tokens | the log-ratio of the sampled token | `--weights extras/readings.py:k3`, `:absolute` |
# | 3 | whether the perception is removed, masked or replaced, and with which image | its text is hidden, with the original image | `without_perception`; the prompts that `score` is given in `train` |
# | 3 | what the tags are called; whether the answer counts as reasoning | `Tags`; it has no role | `token_roles` |
# | 4 | whether contrasts are clamped | at 5 nats | `contrast_scores(..., max_abs=)` |
# | 5 | what is shared: a mean over tokens or over roles, a median, a mean of exponentials, over the response or the group | the mean over all scored tokens | `--weights extras/readings.py:role_balanced`, `:median_baseline`, `:log_mean_exp_baseline` |
# | 5 | whether contrasts are standardized first | no | `--weights extras/readings.py:standardized`, `:role_standardized` |
# | 6 | exponential, sigmoid, linear or softmax; which limits and τ | exponential, [0.8, 1.2] as in RLSD, τ = 1 | `--tau`, `--w-min`, `--w-max`, `--weights extras/readings.py:softmax`, `:sigmoid`, `:linear` |
# | 6 | whether weights are normalized, and what is kept: the mean of each response, the sum | yes, mean 1 over the scored tokens | `--weights extras/readings.py:unnormalized` |
# | 6 | how the mean weights of the roles develop in training | logged: `w_perception`, `w_reasoning` | |
# | 7 | whether the emphasis turns round for A < 0; whether w is mixed with 1 | no; no | `--weights extras/readings.py:sign_aware`, `--lam` |
# | 8 | over what the loss is averaged; clip range; KL; inner epochs | all tokens of the step; 0.2, which acts from the second inner epoch on; none; 1 | `policy_loss(..., denominator=)`, `--clip-low`, `--clip-high`, `--kl-coef`, `--inner-epochs` |
# | 9 | what happens to malformed responses, and to text outside the blocks, such as a `<think>` block in front | they are trained as in GRPO; any such text makes one malformed, since it could carry the perception past step 3 | `parse_response`, last lines of `token_weights` |
# | results | how many seeds, with which spread; whether GRPO had the same reward, form and steps; a control with shuffled weights; accuracy or grounding; how well the models perceived at the start | section 8 | `extras/study.py` |
#
# A function for `--weights` takes the three log-probs, the roles and A, then keywords (`tau`, `w_min`, `w_max`,
# `entropy`, `progress`; end it with `**_`), and returns w. Those of the table, the controls of the study and related
# papers are in `extras/readings.py`, each about ten lines with a test.
