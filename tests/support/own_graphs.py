"""Graphs of the own cells of tests, as they are traced; no torch."""

TEXTS = {
    "Elman": ("own:Elman(x=1,h=1,s=1,p=0,d=0){x0;h0;add 0 1;tanh 2}->3"),
    "Rectified": ("own:Rectified(x=1,h=1,s=1,p=0,d=0){x0;h0;add 0 1;relu 2}->3"),
    "Gru": (
        "own:Gru(x=3,h=3,s=1,p=0,d=0){x0;x1;x2;h0;h1;h2;s0;add 0 3;sigmoid 7;add 1 4;sigmoid "
        "9;mul 8 5;add 2 11;tanh 12;c0x1.0p+0;sub 14 10;mul 15 13;mul 10 6;add 16 17}->18"
    ),
    "Lstm": (
        "own:Lstm(x=4,h=4,s=2,p=0,d=0){x0;x1;x2;x3;h0;h1;h2;h3;s1;add 0 4;add 1 5;add 2 6;add"
        " 3 7;sigmoid 10;mul 13 8;sigmoid 9;tanh 11;mul 15 16;add 14 17;sigmoid 12;tanh 18;mu"
        "l 19 20}->21,18"
    ),
    "Independent": (
        "own:Independent(x=1,h=0,s=1,p=3,d=0){x0;s0;p0;p1;p2;mul 2 1;add 0 5;add 6 4;tanh 7;a"
        "dd 8 3}->9"
    ),
    "Everything": (
        "own:Everything(x=4,h=3,s=3,p=1,d=2){x0;x1;x2;x3;h0;h1;h2;s0;s1;s2;p0;d0;d1;add 0 4;m"
        "ul 10 8;add 13 14;sigmoid 15;mul 1 5;add 17 3;tanh 18;mul 16 8;c0x1.0p+0;sub 21 16;m"
        "ul 22 19;add 20 23;mul 9 11;maximum 25 24;add 2 6;sigmoid 27;c0x1.0p-1;gt 12 29;c0x1"
        ".999999999999ap-4;mul 31 26;add 24 32;tanh 33;mul 28 34;where 30 35 7}->36,24,26"
    ),
    "Five": (
        "own:Five(x=5,h=5,s=1,p=0,d=0){x0;x1;x2;x3;x4;h0;h1;h2;h3;h4;add 0 5;tanh 10;add 1 6;"
        "tanh 12;add 2 7;tanh 14;add 3 8;tanh 16;add 4 9;tanh 18;mul 11 13;mul 15 17;add 20 2"
        "1;c0x1.0p-1;mul 23 19;add 22 24}->25"
    ),
}
