//! The issuer's keys: which are used, when they are fetched, and what becomes of tokens where they cannot be.

use crate::support::*;
use crate::tokens::refused;
use issuer::{encode, jwk, keys, published, raw_claims};
use jwt_simple::prelude::{ECDSAP256KeyPairLike, ES256KeyPair, RSAKeyPairLike};
use jwt_simple::reexports::ct_codecs::{Base64UrlSafeNoPadding, Decoder};
use serde_json::Value;
use std::net::TcpStream;
use std::thread;
use std::time::{Duration, Instant};

const DISCOVERY: &str = "/.well-known/openid-configuration";
const NO_KEY: &str = "publishes no key";

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
    for id in bad.iter().filter_map(|key| key["kid"].as_str()) {
        refused(
            &relay,
            id,
            &token_of(&issuer, &keys().p256, Some(id)),
            401,
            NO_KEY,
        );
    }
    let weak = keys()
        .rsa
        .clone()
        .with_key_id("1024 bits")
        .sign(raw_claims(&issuer.claims(json!({}))))
        .unwrap();
    refused(&relay, "RSA of 1024 bits", &weak, 401, NO_KEY);
}

#[test]
fn several_keys_of_one_name_or_none() {
    for id in [Some("same"), None] {
        let issuer = Issuer::start();
        let rsa = jwk(&published()[0].to_string(), json!({"kid": id}));
        issuer.answer(
            "/jwks",
            200,
            &set(&[&[rsa][..], &two_keys(json!({"kid": id}))].concat()),
        );
        let relay = Relay::start(&issuer);
        relay.connect(&token_of(&issuer, &keys().p256, id)).close();
        relay
            .connect(&token_of(&issuer, &keys().unpublished, id))
            .close();
        relay
            .connect(&token_of(&issuer, &keys().unpublished, None))
            .close();
        let stranger = ES256KeyPair::generate();
        refused(
            &relay,
            "a stranger",
            &token_of(&issuer, &stranger, id),
            401,
            "signature",
        );
    }
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
    type Body<'a> = &'a dyn Fn(&str) -> String;
    let rows: [(&str, &str, u16, Body, &str); 28] = [
        (
            "another issuer",
            DISCOVERY,
            200,
            &another,
            "issuer.example.com",
        ),
        (
            "nearly the issuer",
            DISCOVERY,
            200,
            &slash,
            "another issuer",
        ),
        ("no issuer", DISCOVERY, 200, &nameless, "another issuer"),
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
        ("a list", DISCOVERY, 200, &text("[]"), "another issuer"),
        ("500", DISCOVERY, 500, &jwks, "500"),
        ("204", DISCOVERY, 204, &text(""), "204"),
        ("a redirect", DISCOVERY, 302, &elsewhere, "302"),
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
        refused(&relay, what, &issuer.token(), 503, "keys");
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
        refused(&relay, "an unknown key", &unpublished(&issuer), 401, NO_KEY);
    });
    relay.log.wait("could not fetch keys ");
    assert!(
        start.elapsed() < Duration::from_secs(30),
        "it waits for the issuer"
    );
    relay.connect(&issuer.token()).close();
}

#[test]
fn a_thousand_unknown_keys_cost_one_fetch() {
    let issuer = Issuer::start();
    let relay = Relay::start(&issuer);
    relay.connect(&issuer.token()).close();
    // So slow that the first of all callers wait for it together.
    issuer.slow("/jwks", Duration::from_secs(1));
    let claims = encode(issuer.claims(json!({})).to_string());
    let call = |id: String| {
        let header = encode(json!({"alg": "ES256", "kid": id}).to_string());
        let answer = relay.upgrade(&format!("Authorization: Bearer {header}.{claims}.AAAA\r\n"));
        assert!(
            answer.starts_with("HTTP/1.1 401 ") && answer.contains(NO_KEY),
            "{answer}"
        );
    };
    let start = Instant::now();
    thread::scope(|scope| {
        for caller in 0..8 {
            scope.spawn(move || (0..125).for_each(|number| call(format!("{caller}-{number}"))));
        }
    });
    relay.connect(&issuer.token()).close();
    // Within the pause between two such fetches, which also bounds how long a caller has waited.
    assert!(start.elapsed() < Duration::from_secs(30));
    assert_eq!(asked(&issuer, "/jwks"), 2);
}

#[test]
fn a_new_key_is_fetched_when_a_token_needs_it() {
    let issuer = Issuer::start();
    let relay = Relay::start(&issuer);
    // Once a token has had its answer, the first fetch is over.
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
    refused(&relay, "the old key", &issuer.token(), 401, NO_KEY);
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
    refused(&relay, "an unknown key", &other, 401, NO_KEY);
    let issuer = Issuer::on(&address);
    issuer.answer("/jwks", 200, &set(&two_keys(json!({}))));
    eventually("the new key counts", LIMIT, || {
        relay.try_connect(&other).is_ok()
    });
    relay.connect(&token).close();
}
