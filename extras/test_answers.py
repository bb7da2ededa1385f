"""Tests of answers.py: pip install 'math-verify[antlr4_13_2]' pytest, then
python -m pytest -q extras/test_answers.py"""

import contextlib
import sys
import threading
import time
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
pytest.importorskip("math_verify", reason="pip install 'math-verify[antlr4_13_2]'")

import answers  # noqa: E402
import notation  # noqa: E402

import data  # noqa: E402
import train  # noqa: E402

PLACE = f"{HERE / 'answers.py'}:reward"
OPEN = ""
CM = "Which?\nA. 10 cm\nB. 12 cm\nC. 14 cm\nD. 16 cm"
ONE_LINE = "Which? (A) 10 cm (B) 12 cm (C) 14 cm (D) 16 cm"
COLOR = "What color is the ball? (A) red (B) dark blue (C) green (D) none of these"
GUT = "Which of these lives in the gut? a) E. coli b) S. aureus c) yeast"
CHINESE = "球是什么颜色？\nA、红色\nB、蓝色\nC、绿色"
AUTHORS = "Who wrote it?\nA. J. K. Rowling\nB. J. R. R. Tolkien\nC. C. S. Lewis"
NUMBERS = "How many?\nA. 1\nB. 2\nC. 3\nD. 4"
SENTENCES = "What is shown?\nA) A dog runs.\nB) A cat sleeps.\nC) Both A and B\nName the letter."

# Of each question, answers == the truth, pairs parted by ;;
RIGHT = {
    OPEN: r"""
12.50% == 12.5 % ;; 12.5\% == 12.5% ;; 12.5 percent == 12.5% ;; 30％ == 30% ;; $30\%$ == 30%
0.3 == 30% ;; 7.50kg == 7.5 kg ;; 7.5 KG == 7.5 kg ;; 1,200 m == 1200m ;; 8\,\text{m/s} == 8 m/s
$8\ \mathrm{cm}^2$ == 8 cm^2 ;; 8 cm² == 8 cm^2 ;; 8cm2 == 8 cm² ;; 3 hours == 3 hour
12 square units == 12 ;; 9 apples == 9 apples ;; \frac{3}{2}\text{ m} == 1.5 m
2\sqrt{3}\text{ cm} == 2√3 cm ;; 20 °C == 20°C ;; 4 dollars == $4 ;; -3.0 m == −3 m
30^\circ == 30° ;; 30^{\circ} == 30 ;; 30 degrees == 30° ;; 30º == 30° ;; $30.0^\circ$ == 30 deg
$2,500.00 == $2500 ;; \$2500 == $2,500 ;; €40 == 40 € ;; £3.50 == £3.5 ;; $7 == 7 ;; USD 7 == $7
12,345,678 == 12345678 ;; 12 345 == 12345 ;; 12{,}345 == 12345 ;; 12\,345 == 12345
12'345 == 12345 ;; 3,5 == 3.5 ;; 0,25 == 0.25 ;; 2 1/4 == 2.25 ;; 2¼ == 9/4 ;; ¾ == 0.75
2\frac{1}{4} == 2 1/4 ;; \dfrac{3}{4} == \frac34 ;; \tfrac{6}{8} == 3/4 ;; 3⁄4 == 3/4
-1/2 == -\frac{1}{2} ;; 1 and 1/2 == 1.5 ;; ⅔ == 2/3 ;; 2.5e3 == 2500 ;; 2.5E+03 == 2500
2.5 × 10^3 == 2500 ;; 2.5 \times 10^{3} == 2.5e3 ;; 2.5x10^-3 == 0.0025 ;; 2.5·10³ == 2500
2.5*10**3 == 2500 ;; 10⁴ == 10000 ;; x**2 == x^2 ;; x² == x^2 ;; 6.0 × 10^23 m == 6\times10^{23} m
\(17\) == 17 ;; \[17\] == 17 ;; $$ 17 $$ == 17 ;; \text{red} == red ;; \mathrm{red} == red
\boxed{17} == 17 ;; $\boxed{\text{red}}$ == red ;; \textbf{17} == 17 ;; 17 == \boxed{17}
\left(1, 2\right) == (1,2) ;; \displaystyle 17 == 17 ;; \boldsymbol{17} == 17 ;; [1,2) == [1, 2)
\{1, 2\} == {2,1} ;; (-∞, 3] == (-\infty, 3] ;; (1.0, 2) == (1, 2) ;; x=1, x=2 == x=2, x=1
(1/2, 3) == (0.5, 3) ;; [0, 1] \cup [2, 3] == [0,1]∪[2,3] ;; 1, 3, 5 == 1,3,5
[3, 20, 45, 80] == [3,20,45,80] ;; \sqrt{8} == 2\sqrt{2} ;; π/2 == \frac{\pi}{2}
(x+1)^2 == x^2+2x+1 ;; 3√2 == 3\sqrt{2} ;; sqrt(2)/2 == \frac{\sqrt{2}}{2} ;; x = 4 == 4
y=2x+1 == y = 1 + 2x ;; 2π == 6.2831853 ;; \pi r^2 == πr² ;; 4\pi == 4 pi ;; ３.５ == 3.5
−8 == -8 ;; —8 == -8 ;; “red” == red ;; red。 == red ;; ٣ == 3 ;; ５ｃｍ == 5 cm ;; No. == no
NO == No ;; **No** == no ;; no! == No ;; True == true ;; No, it is not == no
yes, they are parallel == Yes ;; Answer: 12 == 12 ;; The answer is 12. == 12
the red ball == red ball ;; a cat == cat ;; cats == cat ;; Final answer: blue == blue
It is 12 because of the angles == 12 ;; `12` == 12 ;; '12' == 12 ;; an apple. == apple
**Answer:** 12 == 12 ;; 9:15 PM == 9:15pm ;; 9:15 p.m. == 9:15 PM ;; 2021-03-05 == 2021-03-05
Marie Curie == marie curie ;; March 5, 2021 == March 5 2021 ;; +12 == 12 ;; - 12 == -12
-12. == -12 ;; \pm 3 == ±3 ;; +-3 == ±3 ;; -0.5 == -.5 ;; 14 cm == C. 14 cm ;; B == B ;; (b) == B
7, which is not even == 7 ;; A has the largest area == A ;; No, it cannot fly == no
B. so it is == B ;; 2 % == 2% ;; 2.00 % == 2% ;; 2 per cent == 2% ;; 0.02 == 2%
two percent == 2% ;; 2% == 2 ;; 2 == 2% ;; 5 CM == 5 cm ;; 5 centimeters == 5 cm ;; 5 == 5 cm
5 cm == 5 ;; 5 cm. == 5 cm ;; 5\ \mathrm{cm} == 5 cm ;; 60 km/h == 60 km/h
60 km per hour == 60 km/h ;; 60kmh == 60 km/h ;; 12 sq cm == 12 cm²
12 square centimeters == 12 cm^2 ;; 9.8 m/s^2 == 9.8 m/s² ;; 9.8 m/s2 == 9.8 m/s^2 ;; 3 kg == 3kg
1/2 cup == ½ cup ;; 145^{\circ} == 145 ;; 145 deg == 145° ;; 145.0° == 145^\circ
\angle ABC = 145^\circ == 145° ;; $5.00 == $5 ;; 5 USD == $5 ;; US$5 == $5 ;; $1,234.50 == 1234.5
5 dollars == $5 ;; ¥100 == 100元 ;; 100 yuan == ¥100 ;; 5.00 == $5 ;; 1.000,5 == 1000.5
1,5 == 1.5 ;; 1 000 000 == 1000000 ;; 1000 == 1,000 ;; 1½ == 1.5 ;; 3 / 4 == 3/4 ;; -1 1/2 == -1.5
-\frac{1}{2} == -0.5 ;; \frac{-1}{2} == -1/2 ;; 0.75 == 3/4 ;; 6/8 == 3/4 ;; 1\frac12 == 1.5
\frac{3}{4} == 0.75 ;; 5/3 == 1 2/3 ;; 0.333333 == 1/3 ;; 1.5*10^3 == 1500 ;; 1,5e3 == 1500
10^{3} == 1000 ;; 1e3 == 10^3 ;; 3.0 x 10^8 == 3e8 ;; 3 \cdot 10^8 == 3×10⁸ ;; x^{2} == x²
1E-5 == 1e-5 ;; 2^3 == 8 ;; \( 13 \) == 13 ;; \[13\] == 13 ;; \mathbf{13} == 13
$\text{blue}$ == blue ;; \boxed{B} == B ;; \mathrm{13} == 13 ;; The answer is \boxed{13}. == 13
\boxed{13} == \boxed{13} ;; \text{13 cm} == 13 cm ;; \(x = 13\) == x=13 ;; x = 13 == x=13
_13_ == 13 ;; (2,3) == ( 2 , 3 ) ;; \{2,3\} == \{3,2\} ;; [0,1) == [0, 1) ;; (0, +∞) == (0, ∞)
x>2 == x > 2 ;; x ≥ 2 == x \geq 2 ;; x>=2 == x≥2 ;; (0.5, 1) == (1/2, 1) ;; (-\infty,2) == (-∞, 2)
1:2 == 1 : 2 ;; 2:4 == 1:2 ;; 12:00 == 12:00 ;; 2 < x == x > 2 ;; \sqrt{3}/3 == \frac{1}{\sqrt{3}}
x^2-1 == (x-1)(x+1) ;; 2*sqrt(3) == 2√3 ;; \frac{\sqrt{3}}{2} == √3/2 ;; a+b == b+a ;; 3*x == 3x
y = 2x == 2x ;; \frac{2\pi}{3} == 2π/3 ;; 5π cm == 5\pi cm ;; 5π == 5\pi \text{ cm} ;; e^{2} == e²
\cos x == \cos(x) ;; n(n+1)/2 == \frac{n(n+1)}{2} ;; １．５ == 1.5 ;; ﹣3 == -3 ;; 3． == 3
Ⅳ == IV ;; ① == 1 ;; naïve == naïve ;; “Yes” == yes ;; Ω == Ω ;; Straße == strasse ;; yes. == Yes
Yes, it is. == yes ;; no == No. ;; True. == true ;; 是 == 是 ;; FALSE == False
Yes - there is one == yes ;; **Yes** == yes ;; Nope == Nope ;; dogs == dog ;; dog == dogs
The dog == dog ;; an elephant == elephant ;; It's blue == blue ;; blue. == Blue
Blue because of the sky == blue ;; The answer is blue == blue ;; There are 3 == 3 ;; 3 dogs == 3
Three dogs == 3 dogs ;; forty two == 42 ;; 21 == twenty-one ;; 3 (two red, one blue) == 3
boxes == box ;; berries == berry ;; ANSWER: 3 == 3 ;; Answer is 3 == 3 ;; 3. == 3
10:30 == 10:30 ;; 10:30 a.m. == 10:30 AM ;; Jan. 5, 2020 == January 5, 2020
5 January 2020 == 5 Jan 2020 ;; new york == New York ;; St. Louis == St Louis
Dr. Smith == Dr Smith ;; O'Brien == O’Brien ;; Barack Obama == barack obama ;; 2020 == 2020
the 1990s == 1990s ;; -5 == −5 ;; –5 == -5 ;; 5.0 == 5 ;; +5.0 == 5 ;; 0 == -0.0 ;; (-5) == -5
(5) == 5 ;; 05 == 5
""",
    CM: r"""
C == C ;; (c) == C ;; C. == C ;; C) == C ;; **C** == C ;; **C.** 14 cm == C ;; C: 14 cm == C
C - 14 cm == C ;; C 14 cm == C ;; option C == C ;; Choice (C) == C ;; The answer is C == C
Answer: C == C ;; The correct option is C. == C ;; \boxed{C} == C ;; \text{(C)} == C ;; 14 cm == C
14cm == C ;; 14.0 cm == C ;; C == 14 cm ;; C. 14 cm == 14 cm ;; C == (C) 14 cm ;; [C] == C
<C> == C ;; C. 14 cm. == C ;; It's C == C ;; $C$ == C ;; I choose C == C ;; C is correct == C
A, C == AC ;; C and A == A,C ;; A;C == A, C ;; A和C == AC ;; (A), (C) == A and C
A. 10 cm, C. 14 cm == AC ;; A 、 C == AC ;; 10 cm and 14 cm == AC ;; \textbf{(B)} == B ;; B. == B
b) == B ;; b. == B ;; B: 12 cm == B ;; B) 12cm == B ;; Option (B) == B ;; The answer is (B) == B
The answer is option B. == B ;; The correct answer is B. 12 cm == B ;; Answer: (B) 12 cm == B
I think B == B ;; B is the answer == B ;; option b == B ;; B. 12 cm, because AB is long == B
12cm == B ;; 12.0 cm == B ;; 12 centimeters == B ;; **Answer: B** == B ;; *B* == B ;; B! == B
“B” == B ;; It is B == B ;; $\boxed{B}$ == B ;; B . 12 cm == B ;; (B). == B ;; 12 == B
My answer is B == B ;; So the answer is B == B ;; Therefore, B == B
The correct choice is (B). == B ;; B (12 cm) == B ;; Final answer: B == B ;; B == \boxed{B}
B == B. ;; B == (B) 12 cm ;; 12 cm == B. 12 cm ;; (B) == 12 cm ;; B == b ;; A & C == AC
A,C == C,A ;; (A)(C) == AC ;; A and C == AC ;; AC == A and C ;; Options A and C == AC
A C == A,C ;; CA == AC ;; A/C == AC
""",
    COLOR: r"""
dark blue == B ;; Dark Blue. == B ;; B) dark blue == B ;; b == dark blue ;; none of these == D
""",
    GUT: r"""
E. coli == A ;; a == E. coli ;; (a) E. coli == E. coli ;; a) E. coli == A
""",
    CHINESE: r"""
蓝色 == B ;; B、蓝色 == B ;; 答案：B == B ;; 选B == B ;; （Ｂ） == B ;; B。 == B ;; 选项B == B
答案是B == B ;; B == 蓝色 ;; 答案选B。 == B ;; 选择B == B ;; 答案为B == B ;; 应选B == B
B 蓝色 == B ;; B：蓝色 == B ;; 选项 B == B ;; 蓝色。 == B ;; 正确答案是B == B ;; 故选B == B
b == B ;; 【B】 == B ;; B选项 == B
""",
    ONE_LINE: r"""
12 cm == B
""",
    AUTHORS: r"""
J. R. R. Tolkien == B ;; B. J. R. R. Tolkien == B ;; C. S. Lewis == C ;; C == C. S. Lewis
""",
    NUMBERS: r"""
2 == B ;; B == 2 ;; B. 2 == B ;; two == B
""",
    SENTENCES: r"""
A cat sleeps. == B ;; Both A and B == C ;; a cat sleeps == B ;; A == A
""",
}
WRONG = {
    OPEN: r"""
125% == 12.5% ;; 3% == 30% ;; 30% == 3 ;; 0.03 == 30% ;; 7.5 g == 7.5 kg ;; 7.5 m == 7.5 cm
8 m == 8 m/s ;; 8 cm == 8 cm^2 ;; 8 m^2 == 8 m^3 ;; 20°F == 20°C ;; 3 min == 3 hours
9 apples == 9 pears ;; 30° == 30 cm ;; 7 mm == 7 m m ;; €40 == $40 ;; $40 == $4 ;; 12,34 == 1234
1,200 == [1,200] ;; [1,200] == 1200 ;; 1,2,3 == 123 ;; 12 34 == 1234 ;; 3.5 == 35 ;; 2 1/4 == 21/4
1/4 == 2 1/4 ;; 2¼ == 21/4 ;; 3/4 == 4/3 ;; 2.5e3 == 2.5 ;; 2.5×10^3 == 2.5×10^4 ;; 10^4 == 104
x^2 == x2 ;; 10^-4 == 10^4 ;; $18$ == 17 ;; \boxed{18} == 17 ;; \frac{1}{2} == \frac{2}{1}
(1,2] == [1,2) ;; (1,2) == (2,1) ;; {1,2} == (1,2) ;; {1,2} == {1,2,3} ;; [1,2] == {1,2}
3,1,2 == (1,2,3) ;; 1 == (1,2) ;; \sqrt{8} == 2\sqrt{3} ;; 5! == 5 ;; f' == f ;; x+1 == x-1
x=4 == y=4 ;; 2x == x^2 ;; f(x) == fx ;; 3 or 4 == 3 ;; 3, 4 == 3 ;; |x| == x ;; -x == x
n! == n ;; ~5 == -5 ;; x < 3 == x > 3 ;; x<3 == x≤3 ;; a' == a ;; on == no ;; yes == no
no or yes == no ;; not no == no ;; Yes, no == no ;; maybe no == no ;; red == dark red
dark red == red ;; now == no ;; not red == red ;; red and blue == red ;; the == a ;; 12 13 == 12
12 or so == 12 ;; 9:15 AM == 9:15 PM ;; 2021-03-05 == 2021-05-03
J. K. Rowling == J. R. R. Tolkien ;; E. coli == E. faecalis ;; 3:4 == 3/5 ;; 9:15 == 9:51
Mg == mg ;; 5 MW == 5 mW ;; 5 Mg == 5 mg ;; pH == PH ;; CO == Co ;; -12 == 12 ;; 12- == 12
--12 == -12 ;; ±3 == 3 ;; +-3 == -3 ;; O2 == 0₂ ;; 12 cm == B ;; . == 3 ;; $$ == 3
\boxed{} == 3 ;; 200% == 2% ;; 0.2 == 2% ;; 2% == 0.2 ;; 5 m == 5 cm ;; 5 km == 5 m
50 cm == 5 cm ;; 5 cm^2 == 5 cm ;; 5 cm == 5 cm^3 ;; 145 cm == 145° ;; $50 == $5 ;; €5 == $5
5 cents == $5 ;; 1,00 == 100 ;; 10,00 == 1000 ;; 1.000 == 1000 ;; 1/2 == 2/1 ;; 1 1/2 == 11/2
1.1/2 == 1 1/2 ;; 1e5 == 1e-5 ;; 1.5e3 == 1.5 ;; 10^3 == 30 ;; x^3 == x^2 ;; $31$ == 13
(1,0) == (0,1) ;; [0,1) == (0,1] ;; {1,2} == [1,2] ;; (1,2,3) == (1,2) ;; x≥2 == x>2 ;; 2:1 == 1:2
(0, 1) == 0.1 ;; 0,1 == (0,10) ;; 1,2 == 12 ;; \sqrt{3} == \sqrt{2} ;; \sin x == \cos x ;; x == y
X == x ;; 2x == 2y ;; a-b == b-a ;; 5! == 25 ;; 3! == 3 ;; f'' == f' ;; A' == A ;; √5 == 5
−5 == 5 ;; 5 == -5 ;; 5− == -5 ;; + -5 == 5 ;; ½ == 2 ;; ² == 2 ;; 10² == 102 ;; H₂O == H₂
no == yes ;; Yes or no == yes ;; yes/no == yes ;; I do not know == no ;; know == no
yesterday == yes ;; probably not == no ;; not yes == yes ;; Yes, but no == yes
blue and red == blue ;; light blue == blue ;; not blue == blue ;; blue or red == blue
3 or 4 == 4 ;; between 3 and 4 == 3 ;; 13 == 3 ;; 3.1 == 3 ;; 30 == 3 ;; about 3 == 3.2
dog house == dog ;; four == 3 ;; twenty == 21 ;; 10:30 AM == 10:30 PM ;; 10:03 == 10:30
Jan 5, 2020 == Jan 6, 2020 ;; January 5, 2020 == June 5, 2020 ;; York == New York
J. Smith == J. Jones ;; A. Einstein == A. Newton ;; No. 5 == No. 6 ;; mW == MW ;; NA == Na
Co == CO ;; Hz == HZ ;; k == K ;; 5 mL == 5 ML ;; I don't think it is 5 == 5 ;; Neither is 5 == 5
Half of it is 5 == 5 ;; 12, so 13 == 12 ;; 12 cm, as well as 15 cm == 12 cm ;; no idea == no
No answer == no ;; ≥5 == 5 ;; \le 5 == 5 ;; ≠5 == 5 ;; 5~6 == 5 ;; 5→6 == 5 ;; 5 ft 6 in == 5
5 crores == 5 ;; 5 plus == 5 ;; C is incorrect == C ;; C (false) == C ;; A never == A ;; A, b == A
A man == A ;; A cat == A ;; 5, which is wrong == 5 ;; yes, I cannot tell == yes
5, which is not right == 5
""",
    CM: r"""
B == C ;; B. 14 cm == C ;; C. 12 cm == C ;; 12 cm == C ;; B or C == C ;; B, C == C ;; not C == C
C and D == C ;; 14 mm == C ;; 14 cm or 12 cm == C ;; Cat == C ;; A cm == A ;; I == C
(A) (B) == A ;; A. B == B ;; E == C ;; neither A nor C == AC ;; A == 14 cm ;; B == C. 14 cm
C. 16 cm == 14 cm ;; AB == AC ;; A, B, C == AC ;; A == AC ;; AC == A ;; ABCD == AC ;; C == B
A, so B == A
B and C == B ;; B/C == B ;; BC == B ;; A or B == B ;; Not B == B ;; B. 14 cm == B ;; B 14 cm == B
C. 12 cm == B ;; Option C == B ;; 12 m == B ;; 14 cm == B ;; (A) or (B) == B ;; Both A and B == B
All of them == B ;; None == B ;; B? or C? == B ;; A cat == A ;; Be careful == B
B is not the answer == B ;; The answer is not B == B ;; 10 cm, 12 cm == B ;; it is not A == A
12 cm 14 cm == B ;; B. The answer is C == B ;; B) wrong, C) right == B ;; ABCD == B ;; A B == B
bc == B ;; A, B == AC ;; A == A,C ;; ACD == AC ;; A or C == AC ;; A and not C == AC
""",
    COLOR: r"""
red == B ;; blue == B ;; A dark blue == B
""",
    GUT: r"""
b) S. aureus == E. coli ;; E. faecalis == E. coli ;; S. aureus == A
""",
    CHINESE: r"""
A、蓝色 == B ;; 红色 == B ;; 选A == B ;; 不选B == B ;; A和B == B ;; 选C == B ;; B、红色 == B
A或B == B ;; 不是B == B ;; B和C == B ;; B错误 == B
""",
    ONE_LINE: r"""
12 cm == A
""",
    AUTHORS: r"""
J. K. Rowling == B ;; J. Tolkien == A ;; A. J. R. R. Tolkien == B
""",
    NUMBERS: r"""
C == 2 ;; 3 == B ;; B. 3 == B
""",
    SENTENCES: r"""
A dog runs. == B ;; Both A and B == A ;; A dog == B
""",
}


def pairs(table: dict[str, str]) -> list[tuple[str, str, str]]:
    """(answer, truth, question) of each pair in a table."""
    found = []
    for question, text in table.items():
        for pair in text.strip().replace("\n", " ;; ").split(" ;; "):
            given, truth = pair.split(" == ")
            found.append((given, truth, question))
    return found


@pytest.mark.parametrize(("given", "truth", "question"), pairs(RIGHT))
def test_right_answers(given, truth, question):
    assert answers.is_right(given, truth, question)


@pytest.mark.parametrize(("given", "truth", "question"), pairs(WRONG))
def test_wrong_answers(given, truth, question):
    assert not answers.is_right(given, truth, question)


@pytest.mark.parametrize("truth", sorted({truth for _, truth, _ in pairs(RIGHT) + pairs(WRONG)}))
def test_a_truth_is_its_own_answer(truth):
    assert answers.is_right(truth, truth)


@pytest.mark.parametrize(
    ("given", "truth", "question", "right"),
    [
        ("\u200b12", "12", OPEN, True),
        ("12\u00a0cm", "12 cm", OPEN, True),
        ("1\u202f000", "1000", OPEN, True),
        ("caf\u00e9", "cafe\u0301", OPEN, True),
        ("```13```", "13", OPEN, True),
        ("B\n12 cm", "B", CM, True),
        ("C\n12 cm", "B", CM, False),
        ("", "B", OPEN, False),
        ("", "3", OPEN, False),
        ("3", "", OPEN, False),
        ("", "", OPEN, False),
        ("It rusts because of water", "It melts because of heat", OPEN, False),
        ("It fell because of wind", "It fell because of rain", OPEN, False),
        ("B. 12 cm", "B", "Which?\nA: 10 cm\nB: 12 cm", True),
        ("12 cm", "B", "Which?\n- A. 10 cm\n- B. 12 cm", True),
        ("12 cm", "B", "Which?\n**A.** 10 cm\n**B.** 12 cm", True),
        ("12 cm", "B", "By U.S.A. law, how long (A) is it?\nA. 10 cm\nB. 12 cm", True),
        ("12", "B", "Which?\nA. 12 m\nB. 12 cm", False),  # either
        ("B. 12 cm", "B", OPEN, True),
        ("B", "B. 12 cm", OPEN, True),
        ("12 cm", "B. 12 cm", OPEN, True),
        ("A. 12 cm", "B. 12 cm", OPEN, False),
        ("Blue", "B", OPEN, False),
        ("A. B", "B", OPEN, False),
    ],
)
def test_signs_and_options_that_a_table_cannot_hold(given, truth, question, right):
    assert answers.is_right(given, truth, question) == right


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"so \boxed{12}", "12"),
        (r"\boxed{1} or \boxed{ 2 }", "2"),
        (r"\boxed{\frac{1}{2}} or \boxed{12", r"\frac{1}{2}"),
        (r"\boxed{a{b{c{d{e{f}}}}}}", "a{b{c{d{e{f}}}}}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (" none ", "none"),
        (r"\boxed{", r"\boxed{"),
    ],
)
def test_the_last_closed_box_is_the_answer(text, content):
    assert notation.unboxed(text) == content


@pytest.mark.parametrize(
    ("given", "truth", "right"),
    [
        (r"\boxed{\frac{1}{2}} or \boxed{12", "12", False),
        (r"Thus $x \geq 5$ is the solution.", "x >= 5", True),
        (r"Thus $x \geq 6$ is the solution.", "x >= 5", False),
        (r"\boxed{1} and \boxed{2}", "1, 2", True),
        (r"\boxed{1} and \boxed{3}", "1, 2", False),
        (r"It is $5$ or $6$.", "6", False),
        (r"It is not $5$.", "5", False),
        ("The side is 5 cm", "5 cm", True),
        ("The side is 5 m", "5 cm", False),
        ("$5$ cm", "5 m", False),
        (r"2\sqrt{3} cm", r"2\sqrt{3} m", False),
        (r"2\sqrt{3}", r"2\sqrt{3}\text{ m}", True),
    ],
)
def test_formulas_in_a_sentence_and_with_units(given, truth, right):
    assert answers.is_right(given, truth) == right


def test_the_reward_is_the_verifiers_with_more_answers_right():
    judge = train.build_judge(train.resolve_options(["--reward", PLACE]))
    example = data.Example((), "?", r"\sqrt{12}")
    text = data.respond("a", "b", r"$2\sqrt{3}$")
    assert data.verify(text, example).accuracy == 0
    assert judge(text, example) == data.Verdict(1.0, 1.0, 1.0)
    assert judge(text.replace("3", "5"), example).accuracy == 0
    choice = data.Example((), CM, "B")
    assert judge(data.respond("a", "b", "12 cm"), choice).accuracy == 1
    assert judge("hm <answer>(b)</answer>", choice).accuracy == 1
    assert judge("hm <answer>(b)</answer>", choice).format == 0


def test_math_verify_is_asked_for_where_it_is_needed(cache, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    options = ["--reward", PLACE, "--warmup-steps", "20", "--out", str(tmp_path / "run")]
    assert train.main(options) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: math-verify is missing: ")
    assert "pip install 'math-verify[antlr4_13_2]'" in said
    assert answers.is_right("b", "B")
    assert answers.is_right("5cm", "5 cm")
    assert not answers.is_right("on", "no")


LONG = 50_000
PIECES = [
    ". ",
    "9",
    "\n",
    " ",
    "*",
    "$",
    "{",
    "}",
    "(",
    "\\",
    "A. B. ",
    "1,",
    "is ",
    "1 ",
    "'",
    '"',
]
PIECES += [
    "\\boxed{",
    "\\text{",
    "\\(",
    "1/2",
    " since",
    "²",
    "ab!",
    "not 1. ",
    "1. ab c ",
    "m ",
    "a-",
    "$a$ ",
]
PIECES += ["\\boxed{1}", "2**", ",\\!", "B\n", "is 3 or ", ", as"]


@pytest.mark.parametrize("piece", PIECES)
def test_any_text_is_judged_in_linear_time(piece, capsys):
    text = piece * LONG
    start = time.perf_counter()
    for pair in [(text, "3"), (text, "B", CM), (text, r"\sqrt{2}"), ("B", "B", text)]:
        assert isinstance(answers.is_right(*pair), bool)
    assert time.perf_counter() - start < 4
    assert "took over" not in capsys.readouterr().err


def test_a_batch_takes_less_than_a_second_apart_from_math_verify(monkeypatch):
    monkeypatch.setattr(answers, "ask_math_verify", lambda given, truth: False)
    batch = pairs(RIGHT)[::5][:64]
    start = time.perf_counter()
    for pair in batch:
        answers.is_right(*pair)
    assert time.perf_counter() - start < 1


def test_the_time_limit_stands_once_an_answer_and_is_said(monkeypatch, capsys):
    def forever(given, truth):
        while True:
            with contextlib.suppress(Exception):  # as a library may do
                time.sleep(0.01)

    monkeypatch.setattr(answers, "ask_math_verify", forever)
    monkeypatch.setattr(answers, "TIME_LIMIT", 0.1)
    start = time.perf_counter()
    assert not answers.is_right("2√3", "B", "Which?\nA. √1\nB. √2\nC. √3")
    assert time.perf_counter() - start < 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "took over 0.1 s, counted as wrong: '2√3' for 'B'" in said


def test_other_threads_have_no_limit_and_say_so(capsys):
    answers.say_once.cache_clear()
    found = []

    def judge():
        found.append(answers.is_right("2√3", r"\sqrt{12}"))
        found.append(answers.is_right("2√3", r"\sqrt{13}"))

    thread = threading.Thread(target=judge)
    thread.start()
    thread.join()
    assert found == [True, False]
    assert capsys.readouterr().err.count("without a time limit") == 1


@pytest.mark.parametrize(
    "huge", ["9^{99999999}", "9**9**9", "99999!", "so it is $9^{9^{9}}$, is it?"]
)
def test_numbers_that_nothing_could_interrupt_are_not_worked_out(huge):
    start = time.perf_counter()
    assert not answers.is_right(huge, "12x")
    assert time.perf_counter() - start < 1
