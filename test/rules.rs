//! Rules: who may connect by the claims of a token, and with which daemon.

use crate::support::*;
use std::process::Command;

/// A rule that binds these claims, written as TOML.
fn rule(name: &str, bound_claims: &str, more: &str) -> String {
    format!("[[auth.rule]]\nname = '{name}'\nbound_claims = {bound_claims}\n{more}\n")
}

/// A relay with these rules and no organisation, whose daemon says what its arguments are.
fn relay(issuer: &Issuer, rules: &str) -> Relay {
    Setup::new(issuer)
        .set("ALLOWED_ORG", "")
        .config(rules)
        .daemon("echo \"$*\"")
        .start()
}

/// The arguments of the daemon that a token gets.
fn arguments(relay: &Relay, token: &str) -> String {
    String::from_utf8(relay.connect(token).until_close().0)
        .unwrap()
        .trim()
        .to_owned()
}

/// The answer of a relay that refuses.
fn refusal(relay: &Relay, token: &str) -> String {
    relay
        .try_connect(token)
        .err()
        .expect("a session for a token that matches no rule")
}

#[test]
fn patterns() {
    let issuer = Issuer::start();
    for (pattern, matching, others) in [
        (
            "'main'",
            &[json!("main"), json!(["x", "main"])][..],
            &[json!("Main"), json!("main2"), json!("main\n"), json!([])][..],
        ),
        (
            "'release-*'",
            &[json!("release-1"), json!("release-")],
            &[json!("release"), json!("a-release-1")],
        ),
        (
            "'*-release'",
            &[json!("a-release"), json!("-release")],
            &[json!("release"), json!("a-release-1")],
        ),
        (
            "'a*b'",
            &[json!("ab"), json!("axb"), json!("abb"), json!("a\nb")],
            &[json!("a"), json!("aba"), json!("xab"), json!("a/b")],
        ),
        ("'a*a'", &[json!("aa"), json!("aaa")], &[json!("a")]),
        (
            "'*x*'",
            &[json!("x"), json!("axb"), json!("xx")],
            &[json!(""), json!("abc")],
        ),
        (
            "'a*b*c'",
            &[json!("abc"), json!("a-b-c"), json!("abcbc")],
            &[json!("acb"), json!("ac"), json!("ab")],
        ),
        ("'ab*bc'", &[json!("abbc"), json!("ab-bc")], &[json!("abc")]),
        (
            "'*'",
            &[json!(""), json!("anything"), json!(5), json!(false)],
            &[json!(null), json!({"a": "b"}), json!([[1]]), json!("/")],
        ),
        (
            "'**'",
            &[json!(""), json!("x"), json!("/"), json!("a/b/c")],
            &[json!(null)],
        ),
        (
            "'refs/heads/*'",
            &[json!("refs/heads/main"), json!("refs/heads/")],
            &[json!("refs/heads/a/b"), json!("refs/heads/main/")],
        ),
        (
            "'refs/heads/**'",
            &[json!("refs/heads/main"), json!("refs/heads/a/b")],
            &[json!("refs/heads"), json!("refs/tags/main")],
        ),
        (
            "'org/x/**/project/*/vcs-ref/refs/heads/main'",
            &[
                json!("org/x/a/b/project/c/vcs-ref/refs/heads/main"),
                json!("org/x/y/project//vcs-ref/refs/heads/main"),
            ],
            &[
                json!("org/x/project/c/vcs-ref/refs/heads/main"),
                json!("org/x/a/project/c/vcs-ref/refs/heads/x/vcs-ref/refs/heads/main"),
            ],
        ),
        (
            "'*a**b*'",
            &[json!("ab"), json!("xa/b"), json!("a/b/bx"), json!("aa//bb")],
            &[json!("x/ab"), json!("ab/x"), json!("ba")],
        ),
        (
            "'**x*'",
            &[json!("x"), json!("a/x"), json!("a/xx/xb")],
            &[json!("x/"), json!("a/xb/c"), json!("ab")],
        ),
        (
            "'*/**'",
            &[json!("/"), json!("a/"), json!("a/b/c")],
            &[json!("a"), json!("")],
        ),
        (
            "'a.b?[c]'",
            &[json!("a.b?[c]")],
            &[json!("axb?[c]"), json!("a.bc"), json!("a.b?c")],
        ),
        (
            r"'\*(a|b)+^$'",
            &[json!(r"\(a|b)+^$"), json!(r"\x(a|b)+^$")],
            &[json!("*(a|b)+^$"), json!(r"\xa"), json!(r"\a+^$")],
        ),
        (
            "['main', 'release-*']",
            &[json!("main"), json!("release-1"), json!(["release-2"])],
            &[json!("dev")],
        ),
        (
            "42",
            &[json!(42), json!("42"), json!([1, 42])],
            &[json!(420), json!("42.0"), json!(42.5)],
        ),
        (
            "true",
            &[json!(true), json!("true")],
            &[json!(false), json!(1)],
        ),
        ("''", &[json!("")], &[json!("x"), json!(null), json!([])]),
    ] {
        let relay = relay(
            &issuer,
            &rule("only", &format!("{{ ref = {pattern} }}"), ""),
        );
        for value in matching {
            relay
                .connect(&issuer.token_with(json!({ "ref": value })))
                .close();
        }
        for value in others {
            let answer = refusal(&relay, &issuer.token_with(json!({ "ref": value })));
            assert!(
                answer.starts_with("HTTP/1.1 403 "),
                "{pattern} for {value}: {answer}"
            );
        }
    }
}

/// In time that grows with the length alone, whatever a claim repeats.
#[test]
fn patterns_take_no_time() {
    let issuer = Issuer::start();
    let deep = format!("{}b", "**a*".repeat(12));
    for pattern in ["*a".repeat(12) + "*b", "**a".repeat(12) + "**b", deep] {
        let bound = format!("{{ ref = '{pattern}' }}");
        let relay = relay(&issuer, &rule("only", &bound, ""));
        for text in ["a".repeat(8000), "a/".repeat(4000)] {
            let answer = refusal(&relay, &issuer.token_with(json!({ "ref": text })));
            assert!(answer.starts_with("HTTP/1.1 403 "), "{answer}");
            let used = relay.processor_time();
            assert!(used < 500, "{pattern}: {used} hundredths of a second");
        }
    }
}

#[test]
fn the_first_rule_that_matches_decides() {
    let issuer = Issuer::start();
    let rules = [
        rule(
            "main",
            "{ ref = 'refs/heads/main', event_name = 'push' }",
            "extra_args = ['--stdio', '--force-trusted']",
        ),
        rule("pushes", "{ event_name = 'push' }", ""),
        rule("all", "{ repository_owner = '*' }", "extra_args = []"),
    ];
    let relay = relay(&issuer, &rules.concat());
    let token =
        |branch: &str, event: &str| issuer.token_with(json!({"ref": branch, "event_name": event}));
    assert_eq!(
        arguments(&relay, &token("refs/heads/main", "push")),
        "--stdio --force-trusted"
    );
    assert_eq!(
        arguments(&relay, &token("refs/heads/dev", "push")),
        "--stdio"
    );
    assert_eq!(
        arguments(&relay, &token("refs/heads/main", "pull_request")),
        ""
    );
    for (name, event) in [
        ("main", "push"),
        ("pushes", "push"),
        ("all", "pull_request"),
    ] {
        let line = relay.log.wait(&format!("rule=\"{name}\""));
        assert!(line.contains(&format!(" event_name=\"{event}\"")), "{line}");
    }
}

#[test]
fn the_organisation_comes_last() {
    let issuer = Issuer::start();
    let rules = rule(
        "trusted",
        "{ ref = 'refs/heads/main' }",
        "extra_args = ['trusted']",
    );
    let relay = Setup::new(&issuer)
        .config(&rules)
        .daemon("echo \"$*\"")
        .start();
    assert_eq!(arguments(&relay, &issuer.token()), "trusted");
    assert_eq!(
        arguments(&relay, &issuer.token_with(json!({"ref": "refs/heads/dev"}))),
        "--stdio"
    );
    let stranger = json!({"ref": "refs/heads/dev", "repository_owner": "stranger"});
    assert!(refusal(&relay, &issuer.token_with(stranger)).contains(" 403 "));
}

/// What fits the nearest rule is not told, nor anything that the client does not know already.
#[test]
fn a_refusal_names_a_claim_of_the_nearest_rule() {
    let issuer = Issuer::start();
    let rules = [
        rule(
            "secret-far",
            "{ ref = 'secret-a', actor = 'secret-b', repository = 'secret-c' }",
            "",
        ),
        rule(
            "secret-near",
            "{ repository_owner = '*', event_name = 'secret-d' }",
            "",
        ),
    ];
    let relay = relay(&issuer, &rules.concat());
    for (changes, expected) in [
        (
            json!({"event_name": "pull_request"}),
            "event_name is \"pull_request\"",
        ),
        (json!({"event_name": null}), "event_name is missing"),
        (json!({"event_name": ["a\nb"]}), "event_name is "),
    ] {
        let answer = refusal(&relay, &issuer.token_with(changes));
        assert!(
            answer.starts_with("HTTP/1.1 403 ") && answer.contains(expected),
            "{answer}"
        );
        assert!(
            !answer.contains("secret") && !answer.contains("a\nb"),
            "{answer}"
        );
    }
}

/// A name that starts with `/` is a JSON pointer.
#[test]
fn claims_inside_claims() {
    let issuer = Issuer::start();
    let claims = json!({
        "kubernetes.io": {"serviceaccount": {"uid": "1234"}, "a/b": {"~": true}},
        "https://sts.amazonaws.com/": {"ids": ["one", "two"], "number": 42},
        "/own": "mine", "own": "other", "": {"": "nameless"},
    });
    let token = issuer.token_with(claims);
    for (name, value) in [
        ("/kubernetes.io/serviceaccount/uid", "12*"),
        ("/kubernetes.io/a~1b/~0", "true"),
        ("/https:~1~1sts.amazonaws.com~1/ids", "two"),
        ("/https:~1~1sts.amazonaws.com~1/ids/0", "one"),
        ("/https:~1~1sts.amazonaws.com~1/number", "42"),
        ("/~1own", "mine"),
        ("/own", "other"),
        ("//", "nameless"),
    ] {
        let rules = rule("only", &format!("{{ '{name}' = '{value}' }}"), "");
        relay(&issuer, &rules).connect(&token).close();
    }
    for (name, why) in [
        ("/kubernetes.io/serviceaccount/uid", "is \"1234\""),
        ("/kubernetes.io/serviceaccount/name", "is missing"),
        ("/kubernetes.io/serviceaccount/uid/x", "is missing"),
        ("/https:~1~1sts.amazonaws.com~1/ids/2", "is missing"),
        (
            "/https:~1~1sts.amazonaws.com~1/ids",
            r#"is "[\"one\",\"two\"]""#,
        ),
        (
            "kubernetes.io",
            r#"is "{\"a/b\":{\"~\":true},\"serviceaccount\":{\"uid\":\"1234\"}}""#,
        ),
        ("kubernetes.io/serviceaccount/uid", "is missing"),
        ("/nothing", "is missing"),
        ("/~1own", "is \"mine\""),
        ("/own", "is \"other\""),
    ] {
        let rules = rule("only", &format!("{{ '{name}' = 'secret' }}"), "");
        let answer = refusal(&relay(&issuer, &rules), &token);
        let expected = format!("no rule allows it: {name} {why}\n");
        assert!(
            answer.starts_with("HTTP/1.1 403 ") && answer.ends_with(&expected),
            "{answer}"
        );
    }
}

/// Each issuer is believed for its own rules alone, and asked for its own tokens alone.
#[test]
fn several_issuers() {
    let issuers = [Issuer::start(), Issuer::start()];
    let stranger = Issuer::start();
    let [own, other] = [0, 1].map(|n| format!("issuer = '{}'", issuers[n].url()));
    let rules = rule("own", "{ ref = 'a' }", &own) + &rule("other", "{ ref = 'b' }", &other);
    let relay = relay(&stranger, &rules);
    relay
        .connect(&issuers[0].token_with(json!({"ref": "a"})))
        .close();
    relay
        .connect(&issuers[1].token_with(json!({"ref": "b"})))
        .close();
    for (issuer, branch) in [(&issuers[0], "b"), (&issuers[1], "a")] {
        assert!(refusal(&relay, &issuer.token_with(json!({"ref": branch}))).contains(" 403 "));
    }
    // Signed by one, in the name of the other.
    let forged = json!({"ref": "b", "iss": stranger.url()});
    let answer = refusal(&relay, &issuers[0].token_with(forged));
    assert!(
        answer.starts_with("HTTP/1.1 401 ") && answer.contains("issuer"),
        "{answer}"
    );
    assert_eq!(stranger.requests(), Vec::<String>::new());
    assert_eq!(issuers.map(|issuer| issuer.requests().len()), [2, 2]);
}

/// One that is down keeps nobody of another out.
#[test]
fn an_issuer_that_is_down() {
    let issuer = Issuer::start();
    let down = "http://127.0.0.1:1";
    let rules = rule("down", "{ ref = '**' }", &format!("issuer = '{down}'"))
        + &rule("up", "{ ref = '**' }", "");
    let relay = relay(&issuer, &rules);
    relay.connect(&issuer.token()).close();
    let answer = refusal(&relay, &issuer.token_with(json!({"iss": down})));
    assert!(
        answer.starts_with("HTTP/1.1 503 ") && answer.contains("Retry-After"),
        "{answer}"
    );
}

#[test]
fn audiences_of_rules() {
    let issuer = Issuer::start();
    let rules = rule(
        "a",
        "{ ref = '**' }",
        "audience = 'a'\nextra_args = ['for a']",
    ) + &rule(
        "b",
        "{ ref = '**' }",
        "audience = 'b*'\nextra_args = ['for b']",
    );
    let relay = relay(&issuer, &rules);
    let token = |audience: serde_json::Value| issuer.token_with(json!({ "aud": audience }));
    assert_eq!(arguments(&relay, &token(json!("a"))), "for a");
    assert_eq!(arguments(&relay, &token(json!(["x", "b*"]))), "for b");
    // An audience is not a pattern, and the general one is not that of a rule that has its own.
    for audience in [json!("b"), json!("bx"), json!(issuer::AUDIENCE)] {
        let answer = refusal(&relay, &token(audience));
        assert!(
            answer.starts_with("HTTP/1.1 401 ") && answer.contains("udience"),
            "{answer}"
        );
    }
}

#[test]
fn claims_that_identify_the_caller_are_logged() {
    let issuer = Issuer::start();
    let relay = relay(&issuer, &rule("na\"me", "{ ref = '**' }", ""));
    let claims = json!({
        "sub": "a b\n\u{1b}[2J refused", "event_name": "push", "actor": "me", "run_id": 42, "project_path": "group/project",
        "pipeline_id": "7", "nbf": null, "private": "nobody's business",
    });
    relay.connect(&issuer.token_with(claims)).close();
    let line = relay.log.wait("session opened ");
    for part in [
        r#" rule="na\"me" sub="a b\n\u{1b}[2J refused" repository="#,
        r#" ref="refs/heads/main" event_name="push" actor="me" run_id="42" project_path="group/project" pipeline_id="7""#,
    ] {
        assert!(line.contains(part), "{part}\n{line}");
    }
    assert!(!line.contains("nobody"), "{line}");
}

/// Each is a configuration by itself.
#[test]
fn the_recipes() {
    let pages = ["README.md", "nix/providers.md", "nix/operating.md"]
        .map(|page| std::fs::read_to_string(project(page)).unwrap());
    let dir = Dir::new();
    let mut rules = 0;
    let blocks = pages
        .iter()
        .flat_map(|page| page.split("```toml\n").skip(1));
    for recipe in blocks.map(|text| text.split("```").next().unwrap()) {
        let output = binary()
            .arg("--check")
            .arg(dir.write("recipe.toml", recipe))
            .output()
            .unwrap();
        assert!(
            output.status.success(),
            "{recipe}\n{}",
            String::from_utf8_lossy(&output.stderr)
        );
        rules += recipe.matches("[[auth.rule]]").count();
    }
    assert!(rules >= 10, "{rules} rules");
}

/// A key set and a token made by hand, as nix/providers.md says.
#[test]
fn a_token_signed_by_hand() {
    let page = std::fs::read_to_string(project("nix/providers.md")).unwrap();
    let (_, own) = page.split_once("## Keys from a file").unwrap();
    let between = |start: &str, end: &str| {
        let (_, rest) = own.split_once(start).unwrap();
        rest.split_once(end).unwrap().0
    };
    let dir = Dir::new();
    let commands = format!("b64(){}", between("b64()", "\n\n"));
    let output = Command::new("sh")
        .args(["-ec", &format!("{commands}\nprintf %s $NIX_RELAY_TOKEN")])
        .current_dir(dir.path(""))
        .output()
        .unwrap();
    let token = String::from_utf8(output.stdout).unwrap();
    let keys = dir.path("keys.json").display().to_string();
    let config = between("```toml\n", "```").replace("/etc/nix-relay/keys.json", &keys);
    relay(&Issuer::start(), &config).connect(&token).close();
}
