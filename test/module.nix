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

  inherit
    (import ../nix/outputs.nix {
      nixpkgs = {
        inherit lib;
        legacyPackages = { };
      };
    })
    nixosModules
    ;

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
  nixos = import ./support/nixpkgs/nixos.nix {
    inherit lib;
    nix = package "nix";
  };

  # What a machine with this configuration has of nix-relay.
  see =
    configuration:
    let
      inherit
        (lib.evalModules {
          modules = [
            # Under both names, as one may import it.
            nixosModules.default
            nixosModules.nix-relay
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
      inherit (config.systemd) packages services sockets;
      inherit unit;
      inherit (config) users;
      inherit (config.services) nginx;
      reset = head unit.serviceConfig.ExecStart;
      stop = unit.serviceConfig.TimeoutStopSec;
      location = config.services.nginx.virtualHosts."relay.example.com".locations."= /relay";
      elsewhere = config.services.nginx.virtualHosts."relay.example.com".locations."/";
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
    + "proxy_buffer_size 64k;\nproxy_buffers 8 64k;\n"
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
  full = {
    jwks_files."https://gitlab.example.com" = "/etc/gitlab.json";
    rule = {
      name = "all";
      issuer = "https://gitlab.example.com";
      bound_claims = {
        ref_protected = true;
        project_id = 7;
        user_id = [
          1
          "2"
          false
        ];
      };
      max_connections = 4;
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
        sockets = { };
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
        sockets = { };
        services = services: attrNames services == [ "nix-relay" ];
        # With a package that lacks the unit, systemd has none of that name, and starts nothing.
        unit =
          unit:
          unit.overrideStrategy == "asDropin"
          && !unit ? requires
          && !unit.stopIfChanged
          && unit.wantedBy == [ "multi-user.target" ]
          && unit.environment == { SSL_CERT_FILE = "/etc/ssl/certs/ca-certificates.crt"; };
      };
    };
    proxy = {
      given = settings { } // {
        networking.proxy.envVars.https_proxy = "http://proxy:3128";
      };
      seen.unit =
        unit:
        unit.environment == {
          https_proxy = "http://proxy:3128";
          SSL_CERT_FILE = "/etc/ssl/certs/ca-certificates.crt";
        };
    };
    overridden = {
      given = settings { } // {
        networking.proxy.envVars.https_proxy = "http://proxy:3128";
        systemd.services.nix-relay = {
          environment = {
            https_proxy = "http://other:3128";
            SSL_CERT_FILE = "/own.pem";
          };
          serviceConfig.TimeoutStopSec = "2h";
        };
      };
      seen = {
        stop = "2h";
        unit =
          unit:
          unit.environment == {
            https_proxy = "http://other:3128";
            SSL_CERT_FILE = "/own.pem";
          };
      };
    };
    socket = {
      given = with' {
        socketActivation = true;
        settings.auth.allowed_org = "org";
      };
      seen = {
        wrong = [ ];
        unit = unit: unit.requires == [ "nix-relay.socket" ];
        sockets.nix-relay = {
          overrideStrategy = "asDropin";
          wantedBy = [ "sockets.target" ];
          socketConfig.ListenStream = [
            ""
            "0.0.0.0:8080"
          ];
        };
      };
    };
    socket-ipv6 = {
      given = with' {
        socketActivation = true;
        settings = {
          auth.allowed_org = "org";
          server.listen = "[::]:443";
        };
      };
      seen = {
        wrong = [ ];
        sockets =
          sockets:
          sockets.nix-relay.socketConfig.ListenStream == [
            ""
            "[::]:443"
          ];
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
          queue_timeout_secs = 0;
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
            queue_timeout_secs = 0;
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
    all-that-a-rule-may-say = {
      given = with' {
        settings.auth = {
          inherit (full) jwks_files;
          rule = [
            full.rule
            rule
          ];
        };
      };
      seen = {
        wrong = [ ];
        toml = own // {
          auth = {
            inherit (full) jwks_files;
            rule = [
              full.rule
              rule
            ];
          };
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
        elsewhere = {
          return = "404";
        };
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
    no-such-port = {
      given = open "0.0.0.0:65536";
      seen = {
        wrong = wrong ".*\"0.0.0.0:65536\": set .*server.listen .*";
        ports = [ ];
      };
    };
    no-port-at-all = {
      given = open "0.0.0.0:0";
      seen.wrong = wrong ".*\"0.0.0.0:0\": set .*server.listen .*";
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
    socket-for-a-name = {
      given = with' {
        socketActivation = true;
        settings = {
          auth.allowed_org = "org";
          server.listen = "host:80";
        };
      };
      seen.wrong = wrong ".*\"host:80\" .*server.listen .*socketActivation to false\\.";
    };
  };
  wrong = pattern: messages: builtins.length messages == 1 && match pattern (head messages) != null;

  # What may not even be evaluated.
  refused = {
    no-such-option = with' { allowedOrg = "org"; };
    listen-is-a-number = listen 8080;
    organisation-is-a-list = with' { settings.auth.allowed_org = [ "org" ]; };
    rule-without-a-name = with' { settings.auth.rule = [ { bound_claims.ref = "main"; } ]; };
    claim-is-a-fraction = with' {
      settings.auth.rule = [
        {
          name = "x";
          bound_claims.ref = 1.5;
        }
      ];
    };
    rule-for-nobody = with' {
      settings.auth.rule = [
        {
          name = "x";
          bound_claims.ref = "x";
          max_connections = 0;
        }
      ];
    };
    keys-somewhere = settings { auth.jwks_files."https://example.com" = "keys.json"; };
    grace-is-a-text = settings { server.shutdown_grace_secs = "30"; };
    timeout-is-a-text = settings { daemon.timeout_secs = "3600"; };
    queue-timeout-is-negative = settings { daemon.queue_timeout_secs = -1; };
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

  # nginx without a name is refused as soon as somebody looks at nginx.
  nameless = with' {
    nginx.enable = true;
    settings.auth.allowed_org = "org";
  };

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
    )
    // (
      if (builtins.tryEval (builtins.deepSeq (see nameless).nginx true)).success then
        { nameless = "evaluates"; }
      else
        { }
    );
  service = (see situations.least.given).services.nix-relay.serviceConfig;
  written = listToAttrs (
    map (name: {
      inherit name;
      value = (see situations.${name}.given).toml;
    }) good
  );
}
