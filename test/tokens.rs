//! Tokens: a table of those that get in, and one of those that do not, each with the status and a word of the reason.

use crate::support::*;
use issuer::{AUDIENCE, ORG, encode, es256, jwk, keys, now, raw_claims, signed, signed_by_rsa};
use jwt_simple::prelude::{
    ECDSAP256KeyPairLike, ECDSAP384KeyPairLike, EdDSAKeyPairLike, MACLike, RSAKeyPairLike,
};
use jwt_simple::prelude::{HS256Key, HS384Key, HS512Key};
use jwt_simple::prelude::{PS256KeyPair, PS384KeyPair, PS512KeyPair, RS384KeyPair, RS512KeyPair};
use serde_json::Value;
use std::io::{Read, Write};
use superboring::rsa::Padding;

/// The header of a good token.
const HEADER: &str = r#"{"alg":"ES256","kid":"p256","typ":"JWT"}"#;

/// Words of two frequent reasons.
const NO_KEY: &str = "no matching key";
const UNREAD: &str = "not a signed";
/// Newer keys could help, and cannot be had yet, mostly because earlier tokens have asked for them.
const TOO_SOON: &str = "keys are unavailable";
const NOT_NAMED: &str = "names no key";
const NO_EXP: &str = "exp is missing or not a number";

/// Expects a status, a word of the reason in the log, and the token neither there nor in the answer; or says what
/// was wrong with that.
pub fn refusal(relay: &Relay, token: &str, status: u16, why: &str) -> Result<(), String> {
    let mut stream = relay.tcp();
    let peer = stream.local_addr().unwrap();
    stream
        .write_all(upgrade_request(&format!("Authorization: Bearer {token}\r\n")).as_bytes())
        .unwrap();
    let mut answer = read_head(&mut stream);
    if answer.starts_with("HTTP/1.1 101 ") {
        return Err("it got in".into());
    }
    stream.read_to_string(&mut answer).unwrap();
    let line = relay.log.wait(&format!("refused peer={peer} "));
    let about = format!("the answer\n{answer}and in the log\n{line}");
    let told = |part: &str| answer.contains(part) || relay.log.text().contains(part);
    if !answer.starts_with(&format!("HTTP/1.1 {status} "))
        || !line.contains(&format!(" status={status} reason=\""))
    {
        Err(format!("not {status}, but {about}"))
    } else if !line.to_lowercase().contains(why) {
        Err(format!("no {why:?} in {about}"))
    } else if token.split('.').any(|part| part.len() > 8 && told(part)) {
        Err(format!("told on: {about}"))
    } else {
        Ok(())
    }
}

/// The same, as soon as the relay has newer keys if the token needs them.
pub fn refused(relay: &Relay, what: &str, token: &str, status: u16, why: &str) {
    let mut result = Ok(());
    eventually(what, LIMIT, || {
        result = refusal(relay, token, status, why);
        status == 503 || !matches!(&result, Err(wrong) if wrong.contains(TOO_SOON))
    });
    result.unwrap_or_else(|wrong| panic!("{what}: {wrong}"));
}

/// An issuer with one more key, which is the RSA key and does not say for which of its algorithms.
fn issuer() -> Issuer {
    let issuer = Issuer::start();
    let [rsa, p256, p384, ed25519] = issuer::published();
    let any = jwk(&rsa.to_string(), json!({"alg": null, "kid": "any"}));
    issuer.answer(
        "/jwks",
        200,
        &json!({"keys": [rsa, p256, p384, ed25519, any]}).to_string(),
    );
    issuer
}

/// The good claims, signed under a header of the test's own.
fn headed(issuer: &Issuer, header: &str) -> String {
    signed(
        &keys().p256,
        &encode(header),
        &encode(issuer.claims(json!({})).to_string()),
    )
}

/// Claims of the test's own, whatever they are, under the good header.
fn claiming(claims: impl AsRef<[u8]>) -> String {
    signed(&keys().p256, &encode(HEADER), &encode(claims))
}

#[test]
fn tokens_that_get_in() {
    let issuer = issuer();
    let relay = Relay::start(&issuer);
    let claims = || raw_claims(&issuer.claims(json!({})));
    let text = issuer.claims(json!({})).to_string();
    let der = &keys().rsa.to_der().unwrap();
    let with = |changes| issuer.token_with(changes);
    let headed = |header: &str| headed(&issuer, header);
    let untimed = issuer.claims(json!({"exp": null})).to_string();
    let expiring = |exp: &str| claiming(untimed.replacen('{', &format!("{{\"exp\":{exp},"), 1));
    let elsewhere = format!("{}/elsewhere", issuer.url());
    let rows = [
        ("RS256", keys().rsa.sign(claims()).unwrap()),
        (
            "RS256, any",
            keys()
                .rsa
                .clone()
                .with_key_id("any")
                .sign(claims())
                .unwrap(),
        ),
        (
            "RS384",
            RS384KeyPair::from_der(der)
                .unwrap()
                .with_key_id("any")
                .sign(claims())
                .unwrap(),
        ),
        (
            "RS512",
            RS512KeyPair::from_der(der)
                .unwrap()
                .with_key_id("any")
                .sign(claims())
                .unwrap(),
        ),
        (
            "PS256",
            PS256KeyPair::from_der(der)
                .unwrap()
                .with_key_id("any")
                .sign(claims())
                .unwrap(),
        ),
        (
            "PS384",
            PS384KeyPair::from_der(der)
                .unwrap()
                .with_key_id("any")
                .sign(claims())
                .unwrap(),
        ),
        (
            "PS512",
            PS512KeyPair::from_der(der)
                .unwrap()
                .with_key_id("any")
                .sign(claims())
                .unwrap(),
        ),
        ("ES256", keys().p256.sign(claims()).unwrap()),
        ("ES384", keys().p384.sign(claims()).unwrap()),
        ("EdDSA", keys().ed25519.sign(claims()).unwrap()),
        ("expired by 30 s", with(json!({"exp": now() - 30}))),
        (
            "expires in 30 years",
            with(json!({"exp": now() + 1_000_000_000})),
        ),
        (
            "an exp with a fraction",
            with(json!({"exp": now() as f64 + 300.5})),
        ),
        ("expires in 2^63 s", with(json!({"exp": 1_u64 << 63}))),
        ("expires in 2^64 s", expiring("18446744073709551616")),
        ("expires in 1e300 s", with(json!({"exp": 1e300}))),
        ("nbf in 30 s", with(json!({"nbf": now() + 30}))),
        ("iat in 30 s", with(json!({"iat": now() + 30}))),
        (
            "an iat with a fraction",
            with(json!({"iat": now() as f64 - 0.5})),
        ),
        (
            "neither nbf, iat nor sub",
            with(json!({"nbf": null, "iat": null, "sub": null})),
        ),
        ("an audience in a list", with(json!({"aud": [AUDIENCE]}))),
        (
            "an audience among others",
            with(json!({"aud": ["somebody-else", AUDIENCE, "another"]})),
        ),
        (
            "an owner in capitals",
            with(json!({"repository_owner": ORG.to_uppercase()})),
        ),
        (
            "claims of all kinds",
            with(json!({"a": [1, null, {"b": true}], "ü": "\u{1f980}\n\0"})),
        ),
        (
            "almost 16 KiB",
            with(json!({"padding": "p".repeat(11 << 10)})),
        ),
        (
            "space between the claims",
            claiming(text.replace(",\"", " ,\r\n\t\"")),
        ),
        (
            "an escaped name",
            claiming(text.replace("\"exp\"", "\"\\u0065xp\"")),
        ),
        ("no typ", headed(r#"{"alg":"ES256","kid":"p256"}"#)),
        (
            "typ of an access token",
            headed(r#"{"alg":"ES256","kid":"p256","typ":"at+jwt"}"#),
        ),
        (
            "more in the header",
            headed(r#"{"x":{"y":[0]},"alg":"ES256","kid":"p256"}"#),
        ),
        (
            "a jku beside it",
            headed(&json!({"alg": "ES256", "kid": "p256", "jku": elsewhere}).to_string()),
        ),
    ];
    for (what, token) in rows {
        relay
            .try_connect(&token)
            .unwrap_or_else(|answer| panic!("{what}: {answer}"))
            .close();
    }
    assert!(
        !issuer.requests().contains(&"/elsewhere".into()),
        "a token leads the relay somewhere"
    );
}

#[test]
fn tokens_that_do_not() {
    let issuer = issuer();
    let mut relay = Relay::start(&issuer);
    let evil = keys().unpublished.public_key().to_jwk();
    issuer.answer("/elsewhere", 200, &format!("{{\"keys\": [{evil}]}}"));
    let elsewhere = format!("{}/elsewhere", issuer.url());
    let p256 = &keys().p256;
    let own = &keys().unpublished;
    let claims = || raw_claims(&issuer.claims(json!({})));
    let text = issuer.claims(json!({})).to_string();
    let with = |changes| issuer.token_with(changes);
    let headed = |header: Value| headed(&issuer, &header.to_string());
    let headed_text = |header: &str| signed(p256, &encode(header), &encode(&text));
    let untimed = issuer.claims(json!({"exp": null})).to_string();
    let expiring = |exp: &str| claiming(untimed.replacen('{', &format!("{{\"exp\":{exp},"), 1));
    // The same claims, signed with a key of the caller's own.
    let forged = |header: Value| signed(own, &encode(header.to_string()), &encode(&text));
    let unsigned = |header: Value| format!("{}.{}.", encode(header.to_string()), encode(&text));
    // The good header and claims with another signature.
    let good = issuer.token();
    let (parts, signature) = good.rsplit_once('.').unwrap();
    let (header, payload) = parts.split_once('.').unwrap();
    let bearing = |signature: &[u8]| format!("{parts}.{}", encode(signature));
    let es = es256(p256, parts);
    let raw = es.to_bytes();
    let (r, s) = raw.split_at(32);
    let order = "ffffffff00000000ffffffffffffffffbce6faada7179e84f3b9cac2fc632551";
    let order: Vec<u8> = (0..32)
        .map(|i| u8::from_str_radix(&order[2 * i..][..2], 16).unwrap())
        .collect();
    let mut flipped = raw.to_vec();
    flipped[40] ^= 1;
    // Where an algorithm confuses a public key with a secret.
    let public = keys().rsa.public_key();
    let pem = public.to_pem().unwrap();
    let der = public.to_der().unwrap();
    let key = public.to_jwk();
    let pem = pem.as_bytes();
    let key = key.as_bytes();
    let p256_pem = p256.public_key().to_pem().unwrap();
    let hs256 = |secret: &[u8]| {
        HS256Key::from_bytes(secret)
            .with_key_id("rsa")
            .authenticate(claims())
            .unwrap()
    };
    let hs384 = |secret: &[u8]| {
        HS384Key::from_bytes(secret)
            .with_key_id("rsa")
            .authenticate(claims())
            .unwrap()
    };
    let hs512 = |secret: &[u8]| {
        HS512Key::from_bytes(secret)
            .with_key_id("rsa")
            .authenticate(claims())
            .unwrap()
    };
    let rs512 = RS512KeyPair::from_der(&keys().rsa.to_der().unwrap())
        .unwrap()
        .with_key_id("rsa");
    let by_rsa = |padding, header: Value| {
        signed_by_rsa(padding, &encode(header.to_string()), &encode(&text))
    };
    // Base64 as it should not be, and signed like that.
    let spare = |part: &str| {
        let alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
        let last = alphabet.find(part.chars().last().unwrap()).unwrap();
        assert!(part.len() % 4 > 1, "no spare bits");
        format!(
            "{}{}",
            &part[..part.len() - 1],
            &alphabet[last + 1..last + 2]
        )
    };
    let slashed = encode(json!({"alg": "ES256", "kid": "p256", "x": "???>>>"}).to_string());
    let plus = slashed.replace('-', "+").replace('_', "/");
    assert_ne!(slashed, plus);
    let padding = |length: usize| {
        encode(
            issuer
                .claims(json!({"padding": "p".repeat(length)}))
                .to_string(),
        )
    };
    let odd = (0..3)
        .map(padding)
        .find(|part| part.len() % 4 == 3)
        .unwrap();
    let odd_header = [
        HEADER.to_owned(),
        HEADER.to_owned() + " ",
        HEADER.to_owned() + "  ",
    ];
    let odd_header = odd_header
        .map(encode)
        .into_iter()
        .find(|part| part.len() % 4 == 3)
        .unwrap();
    let deep_open = "[".repeat(2000);
    let deep_close = "]".repeat(2000);
    let doubled = |member: &str| claiming(text.replacen('{', &format!("{{{member},"), 1));
    let not_utf8 = [&text.as_bytes()[..text.len() - 1], b",\"x\":\"\x80\"}"].concat();
    let upper = issuer.url().replace("http", "HTTP");
    let rows = [
        // Algorithms: the key decides, never the token.
        (
            "none",
            unsigned(json!({"alg": "none", "kid": "p256"})),
            401,
            NO_KEY,
        ),
        (
            "None",
            unsigned(json!({"alg": "None", "kid": "p256"})),
            401,
            NO_KEY,
        ),
        (
            "NONE",
            unsigned(json!({"alg": "NONE", "kid": "rsa"})),
            401,
            NO_KEY,
        ),
        (
            "nOnE of no key",
            unsigned(json!({"alg": "nOnE"})),
            401,
            NOT_NAMED,
        ),
        (
            "none, well signed",
            headed(json!({"alg": "none", "kid": "p256"})),
            401,
            NO_KEY,
        ),
        (
            "an empty alg",
            headed(json!({"alg": "", "kid": "p256"})),
            401,
            NO_KEY,
        ),
        ("no alg", headed(json!({"kid": "p256"})), 401, "read"),
        (
            "a null alg",
            headed(json!({"alg": null, "kid": "p256"})),
            401,
            "read",
        ),
        (
            "a list of alg",
            headed(json!({"alg": ["ES256"], "kid": "p256"})),
            401,
            "read",
        ),
        (
            "es256",
            headed(json!({"alg": "es256", "kid": "p256"})),
            401,
            NO_KEY,
        ),
        (
            "ES256K",
            headed(json!({"alg": "ES256K", "kid": "p256"})),
            401,
            NO_KEY,
        ),
        ("HS256 with the key as PEM", hs256(pem), 401, NO_KEY),
        ("HS256 with the key as DER", hs256(&der), 401, NO_KEY),
        ("HS256 with the key as JWK", hs256(key), 401, NO_KEY),
        ("HS384 with the key as PEM", hs384(pem), 401, NO_KEY),
        ("HS384 with the key as DER", hs384(&der), 401, NO_KEY),
        ("HS384 with the key as JWK", hs384(key), 401, NO_KEY),
        ("HS512 with the key as PEM", hs512(pem), 401, NO_KEY),
        ("HS512 with the key as DER", hs512(&der), 401, NO_KEY),
        ("HS512 with the key as JWK", hs512(key), 401, NO_KEY),
        (
            "HS256 with the P-256 key",
            hs256(p256_pem.as_bytes()),
            401,
            NO_KEY,
        ),
        (
            "ES256 with an RSA key",
            headed(json!({"alg": "ES256", "kid": "rsa"})),
            401,
            NO_KEY,
        ),
        (
            "ES256 with an Ed25519 key",
            headed(json!({"alg": "ES256", "kid": "ed25519"})),
            401,
            NO_KEY,
        ),
        (
            "ES256 with a P-384 key",
            headed(json!({"alg": "ES256", "kid": "p384"})),
            401,
            NO_KEY,
        ),
        (
            "ES384 with a P-256 key",
            headed(json!({"alg": "ES384", "kid": "p256"})),
            401,
            NO_KEY,
        ),
        (
            "RS256 with a P-256 key",
            headed(json!({"alg": "RS256", "kid": "p256"})),
            401,
            NO_KEY,
        ),
        (
            "RS512 with a key for RS256",
            rs512.sign(claims()).unwrap(),
            401,
            NO_KEY,
        ),
        (
            "RS256, signed as PS256",
            by_rsa(Padding::PKCS1_PSS, json!({"alg": "RS256", "kid": "any"})),
            401,
            "signature",
        ),
        (
            "PS256, signed as RS256",
            by_rsa(Padding::PKCS1, json!({"alg": "PS256", "kid": "any"})),
            401,
            "signature",
        ),
        (
            "RS512, signed as RS256",
            by_rsa(Padding::PKCS1, json!({"alg": "RS512", "kid": "any"})),
            401,
            "signature",
        ),
        // Keys that a token brings along.
        (
            "its own jku, kid",
            forged(json!({"alg": "ES256", "kid": "k", "jku": elsewhere})),
            401,
            NO_KEY,
        ),
        (
            "our kid, its own jku",
            forged(json!({"alg": "ES256", "kid": "p256", "jku": elsewhere})),
            401,
            "signature",
        ),
        ("a key in no set", own.sign(claims()).unwrap(), 401, NO_KEY),
        (
            "our kid, its own key",
            forged(json!({"alg": "ES256", "kid": "p256"})),
            401,
            "signature",
        ),
        (
            "its own jku, no kid",
            forged(json!({"alg": "ES256", "jku": elsewhere})),
            401,
            NOT_NAMED,
        ),
        // Headers.
        (
            "crit",
            headed(json!({"alg": "ES256", "kid": "p256", "crit": ["b64"], "b64": false})),
            401,
            "critical",
        ),
        (
            "crit of what is known",
            headed(json!({"alg": "ES256", "kid": "p256", "crit": ["exp"]})),
            401,
            "critical",
        ),
        (
            "an empty crit",
            headed(json!({"alg": "ES256", "kid": "p256", "crit": []})),
            401,
            "critical",
        ),
        (
            "crit that is text",
            headed(json!({"alg": "ES256", "kid": "p256", "crit": "exp"})),
            401,
            "critical",
        ),
        (
            "a kid that is a path",
            headed(json!({"alg": "ES256", "kid": "../../../dev/null"})),
            401,
            NO_KEY,
        ),
        (
            "a kid that is SQL",
            headed(json!({"alg": "ES256", "kid": "' OR '1'='1"})),
            401,
            NO_KEY,
        ),
        (
            "an empty kid",
            headed(json!({"alg": "ES256", "kid": ""})),
            401,
            NO_KEY,
        ),
        (
            "a kid that is a number",
            headed(json!({"alg": "ES256", "kid": 256})),
            401,
            NOT_NAMED,
        ),
        (
            "a kid that is a list",
            headed(json!({"alg": "ES256", "kid": ["p256"]})),
            401,
            NOT_NAMED,
        ),
        (
            "a kid in capitals",
            headed(json!({"alg": "ES256", "kid": "P256"})),
            401,
            NO_KEY,
        ),
        (
            "a kid of 6 KiB",
            headed(json!({"alg": "ES256", "kid": "k".repeat(6000)})),
            401,
            NO_KEY,
        ),
        (
            "a header of 9 KiB",
            headed(json!({"alg": "ES256", "kid": "p256", "x": "x".repeat(9000)})),
            401,
            "too large",
        ),
        (
            "a kid of 1 MiB",
            headed(json!({"alg": "ES256", "kid": "k".repeat(1 << 20)})),
            431,
            "16 kib",
        ),
        (
            "typ of another kind",
            headed(json!({"alg": "ES256", "kid": "p256", "typ": "JOSE"})),
            401,
            "not a jwt",
        ),
        (
            "typ that is a number",
            headed(json!({"alg": "ES256", "kid": "p256", "typ": 5})),
            401,
            "read",
        ),
        (
            "two alg",
            headed_text(r#"{"alg":"none","alg":"ES256","kid":"p256"}"#),
            401,
            UNREAD,
        ),
        (
            "two kid",
            headed_text(r#"{"alg":"ES256","kid":"rsa","kid":"p256"}"#),
            401,
            UNREAD,
        ),
        (
            "two of the unknown",
            headed_text(&format!(r#"{{"x":1,"x":2,{}"#, &HEADER[1..])),
            401,
            UNREAD,
        ),
        ("a header that is no JSON", headed_text("x"), 401, UNREAD),
        ("a header that is nothing", headed_text(""), 401, UNREAD),
        (
            "a header that is a list",
            headed_text(r#"["ES256",null,"p256"]"#),
            401,
            UNREAD,
        ),
        (
            "a header with more behind",
            headed_text(&format!("{HEADER} {{}}")),
            401,
            UNREAD,
        ),
        (
            "a deep header",
            headed_text(&format!(
                r#"{{"x":{deep_open}{deep_close},{}"#,
                &HEADER[1..]
            )),
            401,
            UNREAD,
        ),
        // Times.
        (
            "expired by 61 s",
            with(json!({"exp": now() - 61})),
            401,
            "it expired at 1",
        ),
        ("exp 0", with(json!({"exp": 0})), 401, "expired"),
        ("no exp", with(json!({"exp": null})), 401, NO_EXP),
        ("exp null", expiring("null"), 401, NO_EXP),
        (
            "an exp that is text",
            with(json!({"exp": "tomorrow"})),
            401,
            NO_EXP,
        ),
        (
            "an exp that is digits",
            with(json!({"exp": (now() + 300).to_string()})),
            401,
            NO_EXP,
        ),
        ("an exp of 1e999", expiring("1e999"), 401, UNREAD),
        ("an exp below 0", with(json!({"exp": -1})), 401, "read"),
        (
            "an exp below -2^63",
            with(json!({"exp": -1e19})),
            401,
            "expired",
        ),
        (
            "an exp that is true",
            with(json!({"exp": true})),
            401,
            NO_EXP,
        ),
        (
            "an exp in a list",
            with(json!({"exp": [now() + 300]})),
            401,
            NO_EXP,
        ),
        (
            "nbf in 120 s",
            with(json!({"nbf": now() + 120})),
            401,
            "not valid yet",
        ),
        (
            "an nbf of 2^63",
            with(json!({"nbf": 1_u64 << 63})),
            401,
            "not valid yet",
        ),
        (
            "an nbf that is text",
            with(json!({"nbf": "0"})),
            401,
            "read",
        ),
        (
            "iat in 120 s",
            with(json!({"iat": now() + 120})),
            401,
            "clock",
        ),
        (
            "an iat that is text",
            with(json!({"iat": "0"})),
            401,
            "read",
        ),
        // For whom, and from whom.
        (
            "another audience",
            with(json!({"aud": "somebody-else"})),
            401,
            "and this relay wants one of {",
        ),
        (
            "an audience with control characters",
            with(json!({"aud": "some\u{7f}\u{9b}body"})),
            401,
            "somebody",
        ),
        (
            "other audiences",
            with(json!({"aud": ["somebody", "else"]})),
            401,
            "audience",
        ),
        (
            "the start of the audience",
            with(json!({"aud": &AUDIENCE[..AUDIENCE.len() - 1]})),
            401,
            "audience",
        ),
        (
            "more than the audience",
            with(json!({"aud": format!("{AUDIENCE}/")})),
            401,
            "audience",
        ),
        (
            "the audience in capitals",
            with(json!({"aud": AUDIENCE.to_uppercase()})),
            401,
            "audience",
        ),
        ("no audience", with(json!({"aud": null})), 401, "audience"),
        (
            "an empty audience",
            with(json!({"aud": ""})),
            401,
            "audience",
        ),
        ("no audiences", with(json!({"aud": []})), 401, "audience"),
        (
            "an audience and a number",
            with(json!({"aud": [AUDIENCE, 5]})),
            401,
            "read",
        ),
        (
            "an audience in two lists",
            with(json!({"aud": [[AUDIENCE]]})),
            401,
            "read",
        ),
        (
            "an audience that is an object",
            with(json!({"aud": {AUDIENCE: AUDIENCE}})),
            401,
            "read",
        ),
        (
            "an audience that is a number",
            with(json!({"aud": 5})),
            401,
            "read",
        ),
        (
            "another issuer",
            with(json!({"iss": "https://issuer.example.com"})),
            401,
            "issuer",
        ),
        (
            "the issuer by name",
            with(json!({"iss": issuer.url().replace("127.0.0.1", "localhost")})),
            401,
            "issuer",
        ),
        (
            "the issuer and a slash",
            with(json!({"iss": format!("{}/", issuer.url())})),
            401,
            "issuer",
        ),
        (
            "the issuer in capitals",
            with(json!({"iss": upper})),
            401,
            "issuer",
        ),
        (
            "the issuer in a list",
            with(json!({"iss": [issuer.url()]})),
            401,
            "issuer",
        ),
        (
            "an issuer that is a number",
            with(json!({"iss": 5})),
            401,
            "issuer",
        ),
        ("no issuer", with(json!({"iss": null})), 401, "issuer"),
        (
            "a sub that is a number",
            with(json!({"sub": 5})),
            401,
            "sub is not a text",
        ),
        // One name, two values: who reads the first and who reads the last must not disagree.
        ("two exp", doubled("\"exp\":1"), 401, "verify"),
        (
            "two iss",
            doubled("\"iss\":\"https://issuer.example.com\""),
            401,
            "verify",
        ),
        (
            "two aud",
            doubled("\"aud\":\"somebody-else\""),
            401,
            "verify",
        ),
        (
            "two aud, one escaped",
            doubled("\"\\u0061ud\":\"somebody-else\""),
            401,
            "verify",
        ),
        (
            "two repository_owner",
            doubled("\"repository_owner\":\"other\""),
            401,
            "verify",
        ),
        (
            "two repository_owner, one escaped",
            doubled("\"repository\\u005fowner\":\"other\""),
            401,
            "verify",
        ),
        // Base64 (RFC 7515, section 2), all of it signed as it stands.
        (
            "padding after the header",
            signed(p256, &format!("{odd_header}="), payload),
            401,
            UNREAD,
        ),
        (
            "padding after the claims",
            signed(p256, header, &format!("{odd}=")),
            401,
            UNREAD,
        ),
        (
            "padding after the signature",
            format!("{good}=="),
            401,
            "read",
        ),
        (
            "a space in the header",
            signed(p256, &format!("{} {}", &header[..8], &header[8..]), payload),
            401,
            UNREAD,
        ),
        (
            "a tab in the claims",
            signed(
                p256,
                header,
                &format!("{}\t{}", &payload[..8], &payload[8..]),
            ),
            401,
            UNREAD,
        ),
        (
            "a space in the signature",
            format!("{parts}.{} {}", &signature[..8], &signature[8..]),
            401,
            "read",
        ),
        ("plus and slash", signed(p256, &plus, payload), 401, UNREAD),
        (
            "spare bits in the header",
            signed(p256, &spare(&odd_header), payload),
            401,
            UNREAD,
        ),
        (
            "spare bits in the claims",
            signed(p256, header, &spare(&odd)),
            401,
            UNREAD,
        ),
        (
            "spare bits in the signature",
            format!("{parts}.{}", spare(signature)),
            401,
            "read",
        ),
        ("a letter too many", format!("{good}AAA"), 401, "read"),
        // Parts.
        ("one part", "token".into(), 401, UNREAD),
        ("two parts", parts.into(), 401, "encoding"),
        ("four parts", format!("{good}.{signature}"), 401, "encoding"),
        (
            "five parts",
            format!("{header}.{payload}.{signature}.{payload}.{signature}"),
            401,
            "encoding",
        ),
        ("a dot more", format!("{good}."), 401, "encoding"),
        ("a dot before", format!(".{good}"), 401, UNREAD),
        ("empty parts", "..".into(), 401, UNREAD),
        ("two tokens", format!("{good} {good}"), 401, "encoding"),
        // Signatures.
        ("no signature", bearing(&[]), 401, "signature"),
        (
            "a signature in DER",
            bearing(es.to_der().as_bytes()),
            401,
            "signature",
        ),
        ("a signature of zeros", bearing(&[0; 64]), 401, "signature"),
        (
            "a signature of ones",
            bearing(&[0xFF; 64]),
            401,
            "signature",
        ),
        ("r = 0", bearing(&[&[0; 32], s].concat()), 401, "signature"),
        ("s = 0", bearing(&[r, &[0; 32]].concat()), 401, "signature"),
        (
            "r = the order",
            bearing(&[&order[..], s].concat()),
            401,
            "signature",
        ),
        ("s and r", bearing(&[s, r].concat()), 401, "signature"),
        ("a byte less", bearing(&raw[..63]), 401, "signature"),
        (
            "a byte more",
            bearing(&[&raw[..], &[0]].concat()),
            401,
            "signature",
        ),
        ("half of it", bearing(r), 401, "signature"),
        ("a bit flipped", bearing(&flipped), 401, "signature"),
        (
            "of other claims",
            format!("{header}.{}.{signature}", padding(1)),
            401,
            "signature",
        ),
        (
            "of another header",
            format!("{}.{payload}.{signature}", encode(HEADER.to_owned() + " ")),
            401,
            "signature",
        ),
        // Claims that are none.
        ("claims that are no JSON", claiming("x"), 401, UNREAD),
        ("claims that are nothing", claiming(""), 401, UNREAD),
        (
            "claims that are a list",
            claiming(format!("[{text}]")),
            401,
            UNREAD,
        ),
        ("claims that are text", claiming("\"x\""), 401, UNREAD),
        (
            "claims with more behind",
            claiming(format!("{text}{{}}")),
            401,
            UNREAD,
        ),
        (
            "claims after a BOM",
            claiming(format!("\u{feff}{text}")),
            401,
            UNREAD,
        ),
        ("claims not in UTF-8", claiming(not_utf8), 401, UNREAD),
        (
            "deep claims",
            doubled(&format!("\"x\":{deep_open}{deep_close}")),
            401,
            UNREAD,
        ),
        (
            "over 16 KiB",
            signed(p256, header, &padding(12 << 10)),
            431,
            "16 kib",
        ),
        (
            "16 KiB and a byte",
            "x".repeat((16 << 10) + 1),
            431,
            "16 kib",
        ),
        // Verified, and still not ours.
        (
            "another owner",
            with(json!({"repository_owner": "other"})),
            403,
            "other",
        ),
        (
            "nearly the owner",
            with(json!({"repository_owner": format!("{ORG}2")})),
            403,
            "owner",
        ),
        (
            "no owner",
            with(json!({"repository_owner": null})),
            403,
            "owner",
        ),
        (
            "an empty owner",
            with(json!({"repository_owner": ""})),
            403,
            "owner",
        ),
        (
            "other owners",
            with(json!({"repository_owner": ["other", format!("{ORG}2")]})),
            403,
            "owner",
        ),
        (
            "a line for the log",
            with(json!({"repository_owner": "a\nrefused \r\"b\u{1b}"})),
            403,
            "owner",
        ),
    ];
    let expected = rows.len();
    let wrong = rows.into_iter().filter_map(|(what, token, status, why)| {
        let mut wrong = refusal(&relay, &token, status, why).err()?;
        if wrong.contains(TOO_SOON) {
            // Another relay may ask.
            wrong = refusal(&Relay::start(&issuer), &token, status, why).err()?;
        }
        Some(format!("{what}: {wrong}\n"))
    });
    let wrong: Vec<_> = wrong.collect();
    assert!(
        wrong.is_empty(),
        "{} of {expected}:\n{}",
        wrong.len(),
        wrong.concat()
    );
    assert!(
        !issuer.requests().contains(&"/elsewhere".into()),
        "a token leads the relay somewhere"
    );
    relay.connect(&good).close();
    let log = relay.stop();
    let lines = log
        .lines()
        .filter(|line| line.contains(" refused peer="))
        .count();
    assert_eq!(
        (lines, log.contains("\nrefused"), log.contains('\u{1b}')),
        (expected, false, false)
    );
    assert!(!log.contains("panicked"), "{log}");
}

/// Where a token need not name a key, it may not bring one either.
#[test]
fn tokens_that_bring_their_own_key() {
    let issuer = Issuer::start();
    let evil = keys().unpublished.public_key().to_jwk();
    let published = jwk(&keys().p256.public_key().to_jwk(), json!({}));
    issuer.answer("/jwks", 200, &json!({"keys": [published]}).to_string());
    issuer.answer("/elsewhere", 200, &format!("{{\"keys\": [{evil}]}}"));
    let elsewhere = format!("{}/elsewhere", issuer.url());
    let claims = encode(issuer.claims(json!({})).to_string());
    let forged = |header: Value| signed(&keys().unpublished, &encode(header.to_string()), &claims);
    let relay = Relay::start(&issuer);
    let as_json = jwk(&evil, json!({}));
    let cert = encode("MII");
    for (what, header, why) in [
        ("a key", json!({"alg": "ES256", "jwk": as_json}), "read"),
        ("as text", json!({"alg": "ES256", "jwk": evil}), "signature"),
        (
            "a jku",
            json!({"alg": "ES256", "jku": elsewhere}),
            "signature",
        ),
        (
            "a x5u",
            json!({"alg": "ES256", "x5u": elsewhere}),
            "signature",
        ),
        ("a x5c", json!({"alg": "ES256", "x5c": [cert]}), "signature"),
        ("none", json!({"alg": "none"}), NO_KEY),
        ("no name", json!({"alg": "ES256", "kid": 256}), "read"),
    ] {
        refused(&relay, what, &forged(header), 401, why);
    }
    assert!(
        !issuer.requests().contains(&"/elsewhere".into()),
        "a token leads the relay somewhere"
    );
}

#[test]
fn an_issuer_with_a_slash_is_another() {
    let issuer = Issuer::start();
    let url = format!("{}/", issuer.url());
    let discovery = json!({"issuer": url, "jwks_uri": format!("{url}jwks")});
    issuer.answer(
        "/.well-known/openid-configuration",
        200,
        &discovery.to_string(),
    );
    let relay = Setup::new(&issuer).set("ISSUER", &url).start();
    refused(&relay, "without the slash", &issuer.token(), 401, "issuer");
    relay
        .connect(&issuer.token_with(json!({"iss": url})))
        .close();
}
