# nix/module.nix in many situations: `failures` holds what is not as it should be, `written` every configuration file, and
# `service` what is different in the unit.
# With the lib of nixpkgs where NIXPKGS_LIB says, else with a stand-in.
{
  lib ? import (
    let
      path = builtins.getEnv "NIXPKGS_LIB";
    in
    if path == "" then ./support/nixpkgs/lib else path
  ),
}:
let
  inherit (builtins)
    attrNames
    concatMap
    filter
    head
    listToAttrs
    mapAttrs
    match
    ;
  inherit (lib.types) anything attrsOf listOf;
  package = name: {
    inherit name;
    type = "derivation";
    outPath = "/${name}";
    meta.mainProgram = name;
  };

  # As much of nixpkgs as the module uses. A configuration file is its own path, so that it can be seen.
  pkgs = {
    callPackage = _: _: package "nix-relay";
    formats.toml = _: {
      type = anything;
      generate = _: builtins.toJSON;
    };
    runCommand =
      _: environment: script:
      assert match ".*\"\\$check\" --check \"\\$written\".*" script != null;
      "${environment.check} ${environment.written}";
    stdenv.buildPlatform.canExecute = _: true;
    stdenv.hostPlatform = "here";
  };

  # And as much of NixOS.
  nixos.options =
    let
      option = type: default: lib.mkOption { inherit type default; };
    in
    {
      assertions = option (listOf anything) [ ];
      networking.firewall.allowedTCPPorts = option (listOf anything) [ ];
      nix.package = option anything (package "nix");
      nix.settings = option (attrsOf anything) { };
      services.nginx = option anything { };
      systemd.packages = option (listOf anything) [ ];
      systemd.services = option (attrsOf anything) { };
      users.groups = option (attrsOf anything) { };
      users.users = option (attrsOf anything) { };
    };

  # What a machine with this configuration has of nix-relay.
  see =
    configuration:
    let
      inherit
        (lib.evalModules {
          modules = [
            (import ../nix/module.nix)
            nixos
            configuration
          ];
          specialArgs = { inherit pkgs; };
        })
        config
        ;
      unit = config.systemd.services.nix-relay;
      start = match "/nix-relay/bin/nix-relay /nix-relay/bin/nix-relay (.*)" (
        lib.last unit.serviceConfig.ExecStart
      );
    in
    {
      wrong = map (a: a.message) (filter (a: !a.assertion) config.assertions);
      toml = builtins.fromJSON (head start);
      ports = config.networking.firewall.allowedTCPPorts;
      nix = config.nix.settings;
      inherit (config.systemd) packages services;
      inherit (config) users;
      inherit (config.services) nginx;
      reset = head unit.serviceConfig.ExecStart;
      stop = unit.serviceConfig.TimeoutStopSec;
      location = config.services.nginx.virtualHosts."relay.example.com".locations."= /relay";
    };

  with' = relay: {
    services.nix-relay = {
      enable = true;
    }
    // relay;
  };
  settings =
    settings:
    with' {
      settings = {
        auth.allowed_org = "org";
      }
      // settings;
    };
  listen = listen: settings { server = { inherit listen; }; };
  open =
    at:
    with' {
      openFirewall = true;
      settings = {
        auth.allowed_org = "org";
        server.listen = at;
      };
    };
  nginx =
    settings:
    with' {
      nginx = {
        enable = true;
        domain = "relay.example.com";
      };
      settings = {
        auth.allowed_org = "org";
      }
      // settings;
    };
  timeouts =
    seconds:
    "proxy_set_header X-Forwarded-For $remote_addr;\n"
    + "proxy_read_timeout ${seconds}s;\nproxy_send_timeout ${seconds}s;\nsend_timeout ${seconds}s;\n";
  rule = {
    name = "main";
    bound_claims = {
      ref = [
        "main"
        "release-*"
      ];
      repository = "org/*";
    };
  };
  own.daemon.nix_daemon_path = "/nix/bin/nix-daemon";

  # What is given; and what is seen then, where a function says whether it is right.
  situations = {
    disabled = {
      given = { };
      seen = {
        wrong = [ ];
        ports = [ ];
        packages = [ ];
        services = { };
        nix = { };
        nginx = { };
      };
    };
    least = {
      given = settings { };
      seen = {
        wrong = [ ];
        toml = own // {
          auth.allowed_org = "org";
          server = { };
        };
        reset = "";
        stop = 60;
        ports = [ ];
        packages = [ (package "nix-relay") ];
        nix.extra-allowed-users = [ "nix-relay" ];
        nginx = { };
        users = {
          groups.nix-relay = { };
          users.nix-relay = {
            group = "nix-relay";
            isSystemUser = true;
          };
        };
        services =
          services:
          attrNames services == [ "nix-relay" ]
          && services.nix-relay.wantedBy == [ "multi-user.target" ]
          && services.nix-relay.environment == { SSL_CERT_FILE = "/etc/ssl/certs/ca-certificates.crt"; };
      };
    };
    everything = {
      given = settings {
        server = {
          listen = "[::]:80";
          shutdown_grace_secs = 3600;
          keepalive_secs = 0;
        };
        auth = {
          issuer = "https://gitlab.example.com";
          rule = [ rule ];
        };
        daemon = {
          nix_daemon_path = "/other";
          extra_args = [ ];
          timeout_secs = 60;
        };
      };
      seen = {
        wrong = [ ];
        stop = 3630;
        toml = {
          server = {
            listen = "[::]:80";
            shutdown_grace_secs = 3600;
            keepalive_secs = 0;
          };
          auth = {
            issuer = "https://gitlab.example.com";
            rule = [ rule ];
          };
          daemon = {
            nix_daemon_path = "/other";
            extra_args = [ ];
            timeout_secs = 60;
          };
        };
      };
    };
    rules-alone = {
      given = with' { settings.auth.rule = [ rule ]; };
      seen = {
        wrong = [ ];
        toml = own // {
          auth.rule = [ rule ];
          server = { };
        };
      };
    };
    another-nix = {
      given = settings { } // {
        nix.package = package "lix";
      };
      seen.toml = toml: toml.daemon.nix_daemon_path == "/lix/bin/nix-daemon";
    };
    another-package = {
      given = with' {
        package = package "nix-relay" // {
          name = "other";
        };
        settings.auth.allowed_org = "org";
      };
      seen.packages = packages: map (p: p.name) packages == [ "other" ];
    };
    trusted = {
      given = with' {
        trustClients = true;
        settings.auth.allowed_org = "org";
      };
      seen.nix = {
        extra-allowed-users = [ "nix-relay" ];
        extra-trusted-users = [ "nix-relay" ];
      };
    };
    closed-firewall = {
      given = listen "0.0.0.0:443";
      seen.ports = [ ];
    };
    open-default = {
      given = with' {
        openFirewall = true;
        settings.auth.allowed_org = "org";
      };
      seen = {
        wrong = [ ];
        ports = [ 8080 ];
      };
    };
    open-ipv4 = {
      given = open "192.0.2.1:443";
      seen = {
        wrong = [ ];
        ports = [ 443 ];
      };
    };
    open-ipv6 = {
      given = open "[2001:db8::1]:8443";
      seen = {
        wrong = [ ];
        ports = [ 8443 ];
      };
    };
    open-name = {
      given = open "relay.example.com:81";
      seen = {
        wrong = [ ];
        ports = [ 81 ];
      };
    };
    nginx = {
      given = nginx { };
      seen = {
        wrong = [ ];
        ports = [ ];
        toml = toml: toml.server.listen == "127.0.0.1:8080";
        nginx =
          nginx:
          nginx.enable
          && nginx.virtualHosts."relay.example.com".forceSSL
          && nginx.virtualHosts."relay.example.com".enableACME;
        location = {
          proxyPass = "http://127.0.0.1:8080";
          proxyWebsockets = true;
          recommendedProxySettings = false;
          extraConfig = timeouts "3690";
        };
      };
    };
    nginx-elsewhere = {
      given = nginx {
        server.listen = "[::1]:81";
        daemon = {
          timeout_secs = 86400;
          queue_timeout_secs = 0;
        };
      };
      seen = {
        wrong = [ ];
        location =
          location: location.proxyPass == "http://[::1]:81" && location.extraConfig == timeouts "86460";
      };
    };
    nginx-own-certificate = {
      given.services = (nginx { }).services // {
        nginx.virtualHosts."relay.example.com" = {
          enableACME = false;
          sslCertificate = "/cert";
        };
      };
      seen.nginx =
        nginx:
        !nginx.virtualHosts."relay.example.com".enableACME
        && nginx.virtualHosts."relay.example.com".forceSSL;
    };

    # Each assertion alone; its message names what to set.
    nobody = {
      given = with' { };
      seen.wrong = wrong ".*set services.nix-relay.settings.auth.allowed_org .*";
    };
    everybody = {
      given = with' {
        settings.auth.rule = [
          rule
          { name = "x"; }
        ];
      };
      seen.wrong = wrong ".*set bound_claims .*services.nix-relay.settings.auth.rule\\.";
    };
    no-port = {
      given = open "0.0.0.0";
      seen = {
        wrong = wrong ".*\"0.0.0.0\": set .*server.listen .*";
        ports = [ ];
      };
    };
    no-number = {
      given = listen "host:http";
      seen.wrong = wrong ".*\"host:http\": set .*server.listen .*";
    };
    open-loopback = {
      given = open "127.0.0.1:8080";
      seen.wrong = wrong ".*openFirewall.* set .*server.listen .*";
    };
    open-loopback-ipv6 = {
      given = open "[::1]:8080";
      seen.wrong = wrong ".*openFirewall.* set .*";
    };
    open-loopback-name = {
      given = open "localhost:8080";
      seen.wrong = wrong ".*openFirewall.* set .*";
    };
    open-nginx = {
      given.services.nix-relay = (nginx { }).services.nix-relay // {
        openFirewall = true;
      };
      seen.wrong = wrong ".*set networking.firewall.allowedTCPPorts = \\[ 80 443 ].*";
    };
    nginx-in-the-open = {
      given = nginx { server.listen = "0.0.0.0:80"; };
      seen.wrong = wrong ".*0.0.0.0:80 unencrypted: set services.nix-relay.settings.server.listen .*";
    };
    nginx-without-a-name = {
      given = with' {
        nginx.enable = true;
        settings.auth.allowed_org = "org";
      };
      seen.wrong = wrong ".*set services.nix-relay.nginx.domain .*";
    };
  };
  wrong = pattern: messages: builtins.length messages == 1 && match pattern (head messages) != null;

  # What may not even be evaluated.
  refused = {
    no-such-option = with' { allowedOrg = "org"; };
    listen-is-a-number = listen 8080;
    organisation-is-a-list = with' { settings.auth.allowed_org = [ "org" ]; };
    rule-without-a-name = with' { settings.auth.rule = [ { bound_claims.ref = "main"; } ]; };
    claim-is-a-set = with' {
      settings.auth.rule = [
        {
          name = "x";
          bound_claims.ref = { };
        }
      ];
    };
  };
  accepted = filter (
    name: (builtins.tryEval (builtins.deepSeq (see refused.${name}).toml true)).success
  ) (attrNames refused);

  judge =
    name:
    { given, seen }:
    let
      all = see given;
      bad = filter (
        key: if builtins.isFunction seen.${key} then !seen.${key} all.${key} else seen.${key} != all.${key}
      ) (attrNames seen);
    in
    map (key: {
      name = "${name}.${key}";
      value = all.${key};
    }) bad;
  good = filter (name: (situations.${name}.seen.wrong or null) == [ ] && name != "disabled") (
    attrNames situations
  );
in
{
  failures =
    listToAttrs (concatMap (name: judge name situations.${name}) (attrNames situations))
    // listToAttrs (
      map (name: {
        inherit name;
        value = "evaluates";
      }) accepted
    );
  service = (see situations.least.given).services.nix-relay.serviceConfig;
  written = listToAttrs (
    map (name: {
      inherit name;
      value = (see situations.${name}.given).toml;
    }) good
  );
}
