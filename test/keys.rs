//! The issuer's keys: which are used, when they are fetched, and what becomes of tokens where they cannot be.

use crate::support::*;
use crate::tokens::refused;
use issuer::{encode, jwk, keys, published, raw_claims, signed_by_rsa};
use jwt_simple::prelude::{ECDSAP256KeyPairLike, ES256KeyPair, RSAKeyPairLike};
use jwt_simple::reexports::ct_codecs::{Base64UrlSafeNoPadding, Decoder};
use serde_json::Value;
use std::io::Read;
use std::net::{TcpListener, TcpStream};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};
use superboring::rsa::Padding;

const DISCOVERY: &str = "/.well-known/openid-configuration";
const NO_KEY: &str = "no matching key";
/// Where the relay cannot know, because it may not ask again yet.
const UNAVAILABLE: &str = "keys are unavailable";

fn set(keys: &[Value]) -> String {
    json!({"keys": keys}).to_string()
}

/// The P-256 key that an issuer publishes, and the one that it does not; changed.
fn two_keys(changes: Value) -> [Value; 2] {
    [&keys().p256, &keys().unpublished].map(|key| jwk(&key.public_key().to_jwk(), changes.clone()))
}

/// Signed with this key, which the header calls as it is told.
fn token_of(issuer: &Issuer, key: &ES256KeyPair, id: Option<&str>) -> String {
    let mut key = ES256KeyPair::from_bytes(&key.to_bytes()).unwrap();
    if let Some(id) = id {
        key = key.with_key_id(id);
    }
    key.sign(raw_claims(&issuer.claims(json!({})))).unwrap()
}

/// Signed with the key that the issuer does not publish unless it is told to.
fn unpublished(issuer: &Issuer) -> String {
    token_of(issuer, &keys().unpublished, Some("unpublished"))
}

/// How often a relay that started then may have fetched keys: at first, twice for tokens, and then every three seconds.
fn allowed(start: Instant) -> usize {
    3 + start.elapsed().as_secs() as usize / 3
}

/// How many times the issuer was asked for this.
fn asked(issuer: &Issuer, path: &str) -> usize {
    issuer
        .requests()
        .iter()
        .filter(|asked| *asked == path)
        .count()
}

/// Stops it, and returns where it was. That is to be an address where no other test listens or connects from, so that
/// the port stays free.
fn gone(issuer: Issuer) -> String {
    let address = issuer.url().replace("http://", "");
    drop(issuer);
    eventually("the issuer is gone", LIMIT, || {
        TcpStream::connect(&address).is_err()
    });
    address
}

#[test]
fn bad_keys_among_good_ones() {
    let issuer = Issuer::start();
    let [rsa, p256, p384, _] = published().map(|key| key.to_string());
    let modulus = jwk(&rsa, json!({}))["n"].as_str().unwrap().to_owned();
    let mut weak = Base64UrlSafeNoPadding::decode_to_vec(modulus, None).unwrap()[..128].to_vec();
    weak[127] |= 1;
    let y = &two_keys(json!({}))[1]["y"];
    let bad = [
        json!({"kty": "unknown", "kid": "unknown"}),
        json!({"kty": "oct", "k": "c2VjcmV0", "kid": "a secret"}),
        jwk(&rsa, json!({"n": encode(weak), "kid": "1024 bits"})),
        jwk(&rsa, json!({"use": "enc", "kid": "RSA for encryption"})),
        jwk(&p256, json!({"use": "enc", "kid": "for encryption"})),
        jwk(&p256, json!({"use": 5, "kid": "for a number"})),
        jwk(
            &p256,
            json!({"key_ops": ["encrypt"], "kid": "for no verifying"}),
        ),
        jwk(&p256, json!({"alg": "ES384", "kid": "another algorithm"})),
        jwk(
            &p256,
            json!({"crv": "P-384", "alg": null, "kid": "another curve"}),
        ),
        jwk(
            &p384,
            json!({"crv": "P-256", "alg": null, "kid": "a longer curve"}),
        ),
        jwk(&p256, json!({"crv": "P-257", "kid": "an unknown curve"})),
        jwk(&p256, json!({"y": y, "kid": "off the curve"})),
        jwk(&p256, json!({"x": "AAAA", "kid": "too short"})),
        jwk(&p256, json!({"x": null, "kid": "half"})),
        jwk(&p256, json!({"kid": 5})),
    ];
    let junk = [
        json!(null),
        json!("key"),
        json!({}),
        json!({"kty": 5}),
        json!([[]]),
    ];
    let good = jwk(&p256, json!({"kid": "good"}));
    issuer.answer("/jwks", 200, &set(&[&junk[..], &bad, &[good]].concat()));
    let relay = Relay::start(&issuer);
    relay
        .connect(&token_of(&issuer, &keys().p256, Some("good")))
        .close();
    // The first has the keys fetched again, and is none of them. By the time of the others that was a moment ago.
    refused(&relay, "unknown", &unpublished(&issuer), 401, NO_KEY);
    for id in bad.iter().filter_map(|key| key["kid"].as_str()) {
        let token = token_of(&issuer, &keys().p256, Some(id));
        refused(&relay, id, &token, 503, UNAVAILABLE);
    }
    let weak = keys()
        .rsa
        .clone()
        .with_key_id("1024 bits")
        .sign(raw_claims(&issuer.claims(json!({}))))
        .unwrap();
    refused(&relay, "RSA of 1024 bits", &weak, 503, UNAVAILABLE);
}

#[test]
fn several_keys_of_one_name() {
    let (issuer, id) = (Issuer::start(), json!({"kid": "same"}));
    let rsa = jwk(&published()[0].to_string(), id.clone());
    let all = [&[rsa][..], &two_keys(id)].concat();
    issuer.answer("/jwks", 200, &set(&all));
    let relay = Relay::start(&issuer);
    for key in [&keys().p256, &keys().unpublished] {
        relay.connect(&token_of(&issuer, key, Some("same"))).close();
    }
    let stranger = token_of(&issuer, &ES256KeyPair::generate(), Some("same"));
    refused(&relay, "a stranger", &stranger, 401, "signature");
}

/// A token that names no key is for the only one that there is (OpenID Connect Core, section 10.1).
#[test]
fn a_token_that_names_no_key() {
    let [rsa, p256, ..] = published().map(|key| key.to_string());
    let issuer = Issuer::start();
    let by_p256 = token_of(&issuer, &keys().p256, None);
    let header = encode(json!({"alg": "RS256"}).to_string());
    let claims = encode(issuer.claims(json!({})).to_string());
    let by_rsa = signed_by_rsa(Padding::PKCS1, &header, &claims);
    // One key, though it is good for six algorithms.
    let any = jwk(&rsa, json!({"alg": null, "kid": null}));
    for (key, token) in [(jwk(&p256, json!({})), &by_p256), (any, &by_rsa)] {
        issuer.answer("/jwks", 200, &set(&[key]));
        Relay::start(&issuer).connect(token).close();
    }
    for id in [json!(null), json!("p256")] {
        issuer.forget();
        issuer.answer("/jwks", 200, &set(&two_keys(json!({"kid": id}))));
        let relay = Relay::start(&issuer);
        refused(&relay, "no kid", &by_p256, 401, "kid");
        refused(&relay, "no kid again", &by_p256, 401, "kid");
        assert_eq!(asked(&issuer, "/jwks"), 1, "another set would not help");
    }
}

/// As many verifications would take seconds.
#[test]
fn a_token_that_names_none_of_many_keys() {
    let (issuer, key) = (Issuer::start(), published()[1].to_string());
    let all: Vec<_> = (0..1900)
        .map(|number| jwk(&key, json!({"kid": number.to_string()})))
        .collect();
    issuer.answer("/jwks", 200, &set(&all));
    let relay = Relay::start(&issuer);
    relay
        .connect(&token_of(&issuer, &keys().p256, Some("1899")))
        .close();
    let (stranger, before) = (ES256KeyPair::generate(), relay.processor_time());
    for _ in 0..5 {
        let token = token_of(&issuer, &stranger, None);
        refused(&relay, "a stranger", &token, 401, "kid");
    }
    let used = relay.processor_time() - before;
    assert!(used < 100, "{used} hundredths of a second");
}

#[test]
fn an_issuer_that_cannot_be_believed() {
    let leads =
        |uri: &'static str| move |url: &str| json!({"issuer": url, "jwks_uri": uri}).to_string();
    let jwks = |url: &str| json!({"issuer": url, "jwks_uri": format!("{url}/jwks")}).to_string();
    let no_uri = |url: &str| json!({"issuer": url}).to_string();
    let another = |url: &str| jwks(url).replacen(url, "https://issuer.example.com", 1);
    let slash = |url: &str| jwks(url).replacen(url, &format!("{url}/"), 1);
    let nameless = |url: &str| json!({"jwks_uri": format!("{url}/jwks")}).to_string();
    let text = |text: &'static str| move |_: &str| text.to_owned();
    let elsewhere = |url: &str| format!("{url}/elsewhere");
    let itself = |url: &str| format!("{url}{DISCOVERY}");
    let deep = |_: &str| "[".repeat(1 << 19);
    let long = |url: &str| jwks(url) + &" ".repeat(2 << 20);
    let long_set =
        |_: &str| json!({"padding": "p".repeat(2 << 20), "keys": published()}).to_string();
    const MISMATCH: &str = "issuer mismatch";
    type Body<'a> = &'a dyn Fn(&str) -> String;
    let rows: [(&str, &str, u16, Body, &str); 30] = [
        (
            "another issuer",
            DISCOVERY,
            200,
            &another,
            "issuer.example.com",
        ),
        ("nearly the issuer", DISCOVERY, 200, &slash, MISMATCH),
        ("no issuer", DISCOVERY, 200, &nameless, MISMATCH),
        ("no jwks_uri", DISCOVERY, 200, &no_uri, "jwks_uri"),
        (
            "plain http",
            DISCOVERY,
            200,
            &leads("http://192.0.2.1/jwks"),
            "jwks_uri",
        ),
        (
            "plain http, by name",
            DISCOVERY,
            200,
            &leads("http://localhost.example/"),
            "jwks_uri",
        ),
        (
            "plain http, a user",
            DISCOVERY,
            200,
            &leads("http://localhost@example.com/"),
            "jwks_uri",
        ),
        (
            "a file",
            DISCOVERY,
            200,
            &leads("file:///etc/passwd"),
            "jwks_uri",
        ),
        ("a path", DISCOVERY, 200, &leads("/jwks"), "jwks_uri"),
        ("no host", DISCOVERY, 200, &leads("https://"), "jwks_uri"),
        ("junk", DISCOVERY, 200, &text("<html>"), DISCOVERY),
        ("nothing", DISCOVERY, 200, &text(""), DISCOVERY),
        ("a list", DISCOVERY, 200, &text("[]"), MISMATCH),
        ("500", DISCOVERY, 500, &jwks, "500"),
        ("204", DISCOVERY, 204, &text(""), "204"),
        ("a redirect", DISCOVERY, 302, &elsewhere, "302"),
        ("where to", DISCOVERY, 302, &elsewhere, "/elsewhere"),
        ("a redirect to itself", DISCOVERY, 301, &itself, "301"),
        (
            "a redirect to plain http",
            DISCOVERY,
            308,
            &text("http://192.0.2.1/"),
            "308",
        ),
        ("lists in lists", DISCOVERY, 200, &deep, DISCOVERY),
        ("2 MiB", DISCOVERY, 200, &long, DISCOVERY),
        ("junk for keys", "/jwks", 200, &text("<html>"), "/jwks"),
        ("no keys", "/jwks", 200, &text("{\"keys\": []}"), "/jwks"),
        (
            "keys that are none",
            "/jwks",
            200,
            &text("{\"keys\": 5}"),
            "/jwks",
        ),
        ("404 for keys", "/jwks", 404, &text("{}"), "404"),
        ("a redirect for keys", "/jwks", 307, &elsewhere, "307"),
        ("where keys are", "/jwks", 307, &elsewhere, "/elsewhere"),
        (
            "a redirect for keys to plain http",
            "/jwks",
            302,
            &text("http://192.0.2.1/"),
            "302",
        ),
        (
            "a key that is none",
            "/jwks",
            200,
            &text("{\"keys\": [{}]}"),
            "/jwks",
        ),
        ("2 MiB of keys", "/jwks", 200, &long_set, "/jwks"),
    ];
    for (what, path, status, body, why) in rows {
        let issuer = Issuer::start();
        issuer.answer(path, status, &body(&issuer.url()));
        issuer.answer("/elsewhere", 200, &jwks(&issuer.url()));
        let relay = Relay::start(&issuer);
        refused(&relay, what, &issuer.token(), 503, UNAVAILABLE);
        let line = relay.log.wait("could not fetch keys ");
        assert!(line.contains(why), "{what}: no {why:?} in {line}");
        assert!(!issuer.requests().contains(&"/elsewhere".into()), "{what}");
    }
}

#[test]
fn an_issuer_that_is_slow_by_9_s() {
    let issuer = Issuer::start();
    issuer.slow("/jwks", Duration::from_secs(9));
    let relay = Relay::start(&issuer);
    // On a machine that is busy as well, it takes a second try.
    eventually("a token gets in", LIMIT, || {
        relay.try_connect(&issuer.token()).is_ok()
    });
}

#[test]
fn an_issuer_that_is_slow_by_60_s() {
    let issuer = Issuer::start();
    let relay = Setup::new(&issuer).set("JWKS_CACHE_TTL_SECS", "1").start();
    relay.connect(&issuer.token()).close();
    issuer.slow(DISCOVERY, Duration::from_secs(60));
    let (start, before) = (Instant::now(), asked(&issuer, DISCOVERY));
    eventually("it is asked again", LIMIT, || {
        asked(&issuer, DISCOVERY) > before
    });
    let fetching = Instant::now();
    for _ in 0..10 {
        relay.connect(&issuer.token()).close();
    }
    assert!(
        fetching.elapsed() < Duration::from_secs(5),
        "who has a cached key waits"
    );
    let without_keys = Relay::start(&issuer);
    thread::scope(|scope| {
        scope.spawn(|| refused(&without_keys, "a token", &issuer.token(), 503, "keys"));
        let unknown = unpublished(&issuer);
        refused(&relay, "an unknown key", &unknown, 503, UNAVAILABLE);
    });
    relay.log.wait("could not fetch keys ");
    assert!(
        start.elapsed() < Duration::from_secs(30),
        "it waits for the issuer"
    );
    relay.connect(&issuer.token()).close();
}

#[test]
fn a_thousand_unknown_keys_cost_few_fetches() {
    let issuer = Issuer::start();
    let relay = Relay::start(&issuer);
    relay.connect(&issuer.token()).close();
    // So slow that the first of all callers wait for it together.
    issuer.slow("/jwks", Duration::from_secs(1));
    let claims = encode(issuer.claims(json!({})).to_string());
    let call = |id: String| {
        let header = encode(json!({"alg": "ES256", "kid": id}).to_string());
        let answer = relay.upgrade(&format!("Authorization: Bearer {header}.{claims}.AAAA\r\n"));
        // Whoever waits for the fetch knows, and whoever comes after it cannot.
        let told = answer.starts_with("HTTP/1.1 401 ") && answer.contains(NO_KEY);
        let is_late = answer.starts_with("HTTP/1.1 503 ") && answer.contains(UNAVAILABLE);
        assert!(told || is_late, "{answer}");
    };
    let start = Instant::now();
    thread::scope(|scope| {
        for caller in 0..8 {
            scope.spawn(move || (0..125).for_each(|number| call(format!("{caller}-{number}"))));
        }
    });
    relay.connect(&issuer.token()).close();
    assert!(start.elapsed() < LIMIT, "a caller waited long");
    let fetches = asked(&issuer, "/jwks");
    assert!(fetches <= allowed(start), "{fetches}");
}

#[test]
fn a_new_key_is_fetched_when_a_token_needs_it() {
    let issuer = Issuer::start();
    let relay = Relay::start(&issuer);
    // A token that came before the first fetch began would have asked for one.
    relay.log.wait("fetched keys ");
    relay.connect(&issuer.token()).close();
    issuer.answer("/jwks", 200, &set(&two_keys(json!({}))));
    relay.connect(&unpublished(&issuer)).close();
    relay.connect(&issuer.token()).close();
    assert_eq!(asked(&issuer, "/jwks"), 2);
}

#[test]
fn keys_rotated_while_sessions_are_open() {
    let issuer = Issuer::start();
    let relay = Setup::new(&issuer).set("JWKS_CACHE_TTL_SECS", "1").start();
    let mut old = relay.connect(&issuer.token());
    let both = two_keys(json!({}));
    issuer.answer("/jwks", 200, &set(&both));
    eventually("the new key counts", LIMIT, || {
        relay.try_connect(&unpublished(&issuer)).is_ok()
    });
    let mut new = relay.connect(&unpublished(&issuer));
    relay.connect(&issuer.token()).close();
    issuer.answer("/jwks", 200, &set(&both[1..]));
    let before = asked(&issuer, "/jwks");
    eventually("two more fetches", LIMIT, || {
        asked(&issuer, "/jwks") >= before + 2
    });
    let wrong = relay.try_connect(&issuer.token()).err();
    assert!(wrong.is_some(), "the old key");
    relay.connect(&unpublished(&issuer)).close();
    for session in [&mut old, &mut new] {
        session.send("still here");
        assert_eq!(session.receive(), b"still here");
    }
}

#[test]
fn an_issuer_that_is_late() {
    let issuer = Issuer::on("127.0.0.2:0");
    let (setup, token) = (Setup::new(&issuer), issuer.token());
    let address = gone(issuer);
    let relay = setup.start();
    relay.log.wait("could not fetch keys ");
    refused(&relay, "a token", &token, 503, "keys");
    let _issuer = Issuer::on(&address);
    eventually("the token works", LIMIT, || {
        relay.try_connect(&token).is_ok()
    });
}

#[test]
fn an_issuer_that_goes_and_comes_back() {
    let issuer = Issuer::on("127.0.0.3:0");
    let relay = Setup::new(&issuer).set("JWKS_CACHE_TTL_SECS", "1").start();
    relay.connect(&issuer.token()).close();
    let (token, other) = (issuer.token(), unpublished(&issuer));
    let address = gone(issuer);
    relay.log.wait("could not fetch keys ");
    relay.connect(&token).close();
    refused(&relay, "an unknown key", &other, 503, UNAVAILABLE);
    let issuer = Issuer::on(&address);
    issuer.answer("/jwks", 200, &set(&two_keys(json!({}))));
    eventually("the new key counts", LIMIT, || {
        relay.try_connect(&other).is_ok()
    });
    relay.connect(&token).close();
}

/// A token of nobody does not make one of a new key look like one of nobody, too.
#[test]
fn a_new_key_after_an_unknown_one() {
    let issuer = Issuer::start();
    let relay = Relay::start(&issuer);
    relay.connect(&issuer.token()).close();
    let stranger = token_of(&issuer, &ES256KeyPair::generate(), Some("unknown"));
    refused(&relay, "a stranger", &stranger, 401, NO_KEY);
    issuer.answer("/jwks", 200, &set(&two_keys(json!({}))));
    eventually("the new key counts", LIMIT, || {
        relay.try_connect(&unpublished(&issuer)).is_ok()
    });
    assert_eq!(asked(&issuer, "/jwks"), 3);
}

/// Some issuers change the key and keep its name.
#[test]
fn a_new_key_of_an_old_name() {
    let start = Instant::now();
    let issuer = Issuer::start();
    let relay = Relay::start(&issuer);
    relay.connect(&issuer.token()).close();
    let named = |key| token_of(&issuer, key, Some("p256"));
    let key = jwk(
        &keys().unpublished.public_key().to_jwk(),
        json!({"kid": "p256"}),
    );
    issuer.answer("/jwks", 200, &set(&[key]));
    relay.connect(&named(&keys().unpublished)).close();
    // Again and again would be for strangers to decide.
    let stranger = ES256KeyPair::generate();
    for (what, key) in [("the old key", &keys().p256), ("a stranger", &stranger)] {
        refused(&relay, what, &named(key), 401, "signature");
    }
    relay.connect(&named(&keys().unpublished)).close();
    let fetches = asked(&issuer, "/jwks");
    assert!(fetches <= allowed(start), "{fetches}");
}

#[test]
fn documents_after_a_byte_order_mark() {
    let issuer = Issuer::start();
    let discovery = json!({"issuer": issuer.url(), "jwks_uri": format!("{}/jwks", issuer.url())});
    issuer.answer(DISCOVERY, 200, &format!("\u{feff}{discovery}"));
    issuer.answer("/jwks", 200, &format!("\u{feff}{}", set(&published())));
    Relay::start(&issuer).connect(&issuer.token()).close();
}

/// What an issuer sends that nobody asked for, and what the log has to say of it.
#[test]
fn documents_that_are_something_else() {
    let compressed = |text: &str| {
        let gzip = format!("printf %s '{text}' | gzip");
        let output = Command::new("sh").args(["-c", &gzip]).output().unwrap();
        assert!(output.status.success());
        output.stdout
    };
    let json = "Content-Type: application/json";
    let rows = [
        (vec![json, "Content-Encoding: gzip"], true, "gzip"),
        (vec![json, "Content-Encoding: br"], false, "br"),
        (
            vec!["Content-Type: text/html; charset=utf-8"],
            false,
            "text/html",
        ),
    ];
    for path in [DISCOVERY, "/jwks"] {
        for (lines, is_gzip, why) in &rows {
            let issuer = Issuer::start();
            let body = if *is_gzip {
                compressed(&set(&published()))
            } else {
                b"<html>sign in</html>".into()
            };
            issuer.answer_with(path, 200, lines, body);
            let relay = Relay::start(&issuer);
            refused(&relay, why, &issuer.token(), 503, UNAVAILABLE);
            let line = relay.log.wait("could not fetch keys ");
            assert!(line.contains(why) && line.contains(path), "{why}: {line}");
            let coding = |line: &String| line.to_lowercase() == "accept-encoding: identity";
            assert!(
                issuer.headers().iter().any(coding),
                "{:?}",
                issuer.headers()
            );
        }
    }
}

/// In the clear, a proxy could answer with keys of its own.
#[test]
fn an_issuer_on_this_machine_is_asked_past_any_proxy() {
    let (issuer, proxy) = (Issuer::start(), TcpListener::bind("127.0.0.1:0").unwrap());
    let url = format!("http://{}", proxy.local_addr().unwrap());
    proxy.set_nonblocking(true).unwrap();
    for name in ["http_proxy", "https_proxy", "all_proxy"] {
        for name in [name.to_owned(), name.to_uppercase()] {
            let relay = Setup::new(&issuer).env(&name, &url).start();
            relay.connect(&issuer.token()).close();
            assert!(proxy.accept().is_err(), "{name}");
        }
    }
}

/// And the others through it, in a tunnel.
#[test]
fn an_issuer_elsewhere_is_asked_through_a_proxy() {
    let (issuer, proxy) = (Issuer::start(), TcpListener::bind("127.0.0.1:0").unwrap());
    let url = format!("http://{}", proxy.local_addr().unwrap());
    proxy.set_nonblocking(true).unwrap();
    for name in ["https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"] {
        let setup = Setup::new(&issuer).set("ISSUER", "https://issuer.invalid");
        let _relay = setup.env(name, &url).start();
        let (mut asked, mut line) = (None, [0; 37]);
        eventually("the proxy is asked", LIMIT, || {
            asked = proxy.accept().ok();
            asked.is_some()
        });
        let asked = &mut asked.unwrap().0;
        asked.set_nonblocking(false).unwrap();
        asked.set_read_timeout(Some(LIMIT)).unwrap();
        asked.read_exact(&mut line).unwrap();
        assert_eq!(&line, b"CONNECT issuer.invalid:443 HTTP/1.1\r\n", "{name}");
    }
}

/// To ask without it would be what nobody wants who sets it.
#[test]
fn a_proxy_that_cannot_be_used() {
    for (name, url) in [
        ("ALL_PROXY", "socks5://127.0.0.1:1080"),
        ("all_proxy", "socks5h://127.0.0.1:1080"),
        ("https_proxy", "socks4://127.0.0.1:1080"),
        ("HTTPS_PROXY", "ftp://127.0.0.1"),
        ("ALL_PROXY", "http://"),
    ] {
        let mut relay = binary();
        relay.env("NIX_RELAY_ALLOWED_ORG", "org").env(name, url);
        relay.env("NIX_RELAY_ISSUER", "https://issuer.invalid");
        let (code, said) = fails(relay.env("NIX_RELAY_LISTEN", "127.0.0.1:0"));
        assert!(code == 2 && said.contains(name), "{name}={url}: {said}");
    }
}

/// Exit status and standard error of one that does not start.
fn fails(command: &mut Command) -> (i32, String) {
    let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
    let log = Log::of(child.stderr.take().unwrap());
    let mut status = None;
    for _ in 0..500 {
        status = child.try_wait().unwrap();
        if status.is_some() {
            break;
        }
        thread::sleep(Duration::from_millis(10));
    }
    let _ = child.kill();
    child.wait().unwrap();
    let status = status.unwrap_or_else(|| panic!("it runs: {}", log.text()));
    (status.code().unwrap(), log.wait(""))
}

/// An issuer that nobody can ask, with these keys in a file, and a relay for it.
struct Offline {
    issuer: Issuer,
    dir: Dir,
    relay: Relay,
}

const UNREACHABLE: &str = "https://kubernetes.default.svc.cluster.local";

fn jwks_files(path: &std::path::Path) -> String {
    format!(
        "[auth.jwks_files]\n'{UNREACHABLE}' = '{}'\n",
        path.display()
    )
}

impl Offline {
    fn start(keys: &[Value]) -> Offline {
        let (issuer, dir) = (Issuer::start(), Dir::new());
        let files = jwks_files(&dir.write("jwks.json", &set(keys)));
        let setup = Setup::new(&issuer).config(&files);
        let relay = setup.set("ISSUER", UNREACHABLE).start();
        Offline { issuer, dir, relay }
    }

    fn token(&self, key: &ES256KeyPair, id: &str) -> String {
        let key = ES256KeyPair::from_bytes(&key.to_bytes()).unwrap();
        let claims = self.issuer.claims(json!({"iss": UNREACHABLE}));
        key.with_key_id(id).sign(raw_claims(&claims)).unwrap()
    }

    fn old(&self) -> String {
        self.token(&keys().p256, "p256")
    }

    fn new_one(&self) -> String {
        self.token(&keys().unpublished, "unpublished")
    }
}

#[test]
fn keys_from_a_file() {
    let offline = Offline::start(&two_keys(json!({}))[..1]);
    offline.relay.connect(&offline.old()).close();
    let forged = offline.token(&keys().unpublished, "p256");
    refused(&offline.relay, "another key", &forged, 401, "signature");
    assert_eq!(offline.issuer.requests(), Vec::<String>::new());
}

/// Beside an issuer that is asked as ever.
#[test]
fn keys_from_a_file_and_keys_from_an_issuer() {
    let (issuer, dir) = (Issuer::start(), Dir::new());
    let files = jwks_files(&dir.write("jwks.json", &set(&two_keys(json!({}))[1..])));
    let rule = format!(
        "[[auth.rule]]\nname = 'offline'\nissuer = '{UNREACHABLE}'\nbound_claims.ref = '**'\n"
    );
    let relay = Setup::new(&issuer).config(&(files + &rule)).start();
    relay.connect(&issuer.token()).close();
    let offline = raw_claims(&issuer.claims(json!({"iss": UNREACHABLE})));
    relay
        .connect(&keys().unpublished.sign(offline).unwrap())
        .close();
    // Each has its own keys alone.
    let claims = raw_claims(&issuer.claims(json!({})));
    let forged = keys().unpublished.sign(claims).unwrap();
    refused(&relay, "a key of the file", &forged, 401, NO_KEY);
}

#[test]
fn a_file_of_keys_that_changes() {
    let both = two_keys(json!({}));
    let offline = Offline::start(&both[..1]);
    let relay = &offline.relay;
    let gets_in = |token: String| relay.try_connect(&token).is_ok();
    assert!(gets_in(offline.old()) && !gets_in(offline.new_one()));
    // Written anew, and put in the place of the old one.
    offline.dir.write("jwks.json", &set(&both));
    eventually("the new key counts", LIMIT, || gets_in(offline.new_one()));
    assert!(gets_in(offline.old()));
    let next = offline.dir.write("next.json", &set(&both[1..]));
    std::fs::rename(next, offline.dir.path("jwks.json")).unwrap();
    eventually("the old key counts no more", LIMIT, || {
        !gets_in(offline.old())
    });
    assert!(gets_in(offline.new_one()));
}

#[test]
fn a_file_of_keys_that_breaks_later() {
    let both = two_keys(json!({}));
    let offline = Offline::start(&both[..1]);
    let path = offline.dir.path("jwks.json");
    for broken in ["{\"keys\": [", "{\"keys\": []}", ""] {
        let before = offline.relay.log.text().matches("jwks.json").count();
        offline.dir.write("jwks.json", broken);
        eventually("the log says so", LIMIT, || {
            offline.relay.connect(&offline.old()).close();
            offline.relay.log.text().matches("jwks.json").count() > before
        });
    }
    std::fs::remove_file(&path).unwrap();
    eventually("the log says so", LIMIT, || {
        offline.relay.connect(&offline.old()).close();
        offline.relay.log.text().contains("No such file")
    });
    assert!(offline.relay.log.text().contains(" WARN "));
    offline.dir.write("jwks.json", &set(&both));
    eventually("the new key counts", LIMIT, || {
        offline.relay.try_connect(&offline.new_one()).is_ok()
    });
}

#[test]
fn a_file_of_keys_that_is_absent_or_broken() {
    let dir = Dir::new();
    for (name, text) in [
        ("absent", None),
        ("no-json", Some("keys")),
        ("no-keys", Some("{\"keys\": []}")),
        (
            "no-key-of-use",
            Some("{\"keys\": [{\"kty\": \"oct\", \"k\": \"c2VjcmV0\"}]}"),
        ),
    ] {
        let path = dir.path(name);
        if let Some(text) = text {
            dir.write(name, text);
        }
        let config = dir.write("config.toml", &jwks_files(&path));
        let mut relay = binary();
        relay
            .env("NIX_RELAY_ALLOWED_ORG", "org")
            .env("NIX_RELAY_ISSUER", UNREACHABLE);
        let relay = relay.env("NIX_RELAY_LISTEN", "127.0.0.1:0").arg(config);
        let (code, said) = fails(relay);
        assert!(
            code == 2 && said.contains(path.to_str().unwrap()),
            "{name}: {code} {said}"
        );
    }
}
